"""The alignment gradient: the gradient of a loss on safety batches, one tensor per parameter."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim._torch_private import divide_all_, without_gradient_hooks
from safegrad_optim.batches import Part, SourceBatches
from safegrad_optim.forward import autocast, unchanged_training
from safegrad_optim.parallel import (
    Share,
    has_ranks,
    inner_module,
    local,
    mean_over_ranks,
    on_any_rank,
    own_leaves,
    placed_as,
    require_same,
    share_of,
    synchronized,
)


class Alignment(ABC):
    """Gradient of a loss on the next safety batch, with the model and its `.grad` left as they were.

    With several ranks all have to make and call it together: data-parallel rank r of n computes the rows
    r, r + n, ... of each batch, and the gradients are averaged, so that the result is that of one process.
    """

    def __init__(
        self, model: nn.Module, sources: Sequence[SourceBatches], autocast_dtype: torch.dtype | None
    ) -> None:
        self.model = inner_module(model)
        self._sources = tuple(sources)
        self._share = share_of(self.model)
        require_same(
            {"autocast_dtype": autocast_dtype}
            | {f"safety batches{suffix}": source.digest[:12] for suffix, source in self._named_sources()}
            | {f"seed{suffix}": source.seed for suffix, source in self._named_sources()},
            "Give every rank all safety rows and the same options; rows are split over ranks in here.",
        )
        self.autocast_dtype = autocast_dtype
        self.last_loss: Tensor | None = None  # of the last call, 0-dim, on the model's device
        # Gradients near the reference are below the range of fp16. GradScaler starts here too.
        self._fp16_scale = 2.0**16

    @abstractmethod
    def _losses(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield losses whose sums on the ranks have the mean of the loss of one batch of each source.

        Each has its own graph, and all ranks yield as many: FSDP2 communicates in each pass.
        """

    def __call__(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """Return the gradient of the next safety batch's loss by each parameter, `None` where there is none.

        Raises:
            ValueError: the loss depends on no trainable parameter, the reference is not aligned any more, or
                the model has gradients of other parameters.
            RuntimeError: the model was made parallel, or in another way, since this was built.
        """
        self._check_before_call()
        # Once, since to walk through a model takes a launch-bound step longer than surgery does.
        of_model = [*self.model.parameters()]
        _require_no_others(self.model, of_model, parameters)
        with (
            synchronized(self.model),
            own_leaves(self.model) as leaves,
            # Of the user, who does not expect the alignment's gradients there.
            without_gradient_hooks(of_model),
        ):
            own = [leaves.get(parameter, parameter) for parameter in parameters]
            stashed = {tensor: tensor.grad for tensor in (*of_model, *own)}
            try:
                with torch.enable_grad(), unchanged_training(self.model):
                    self.last_loss, grads = self._scaled_backward(own, stashed)
            finally:
                for tensor, grad in stashed.items():
                    tensor.grad = grad
        for source in self._sources:
            source.taken += 1
        return grads

    def _check_before_call(self) -> None:
        """Check what may have changed since this was built."""
        # Without a process group nothing can have been made parallel, and nobody need look through the model.
        share = share_of(self.model) if has_ranks() else Share(0, 1)
        if share != self._share:
            raise RuntimeError(
                f"This rank computes {share} of each safety batch, but the alignment was built for "
                f"{self._share}. Build it after init_process_group(), fully_shard() and parallelize_module()."
            )

    def _scaled_backward(
        self, parameters: list[Tensor], touched: Collection[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of the next batch; in fp16 of a scaled loss, so that they do not underflow."""
        # Gradients pass through fp16 also to fp32 adapters on a model in fp16.
        dtypes = {self.autocast_dtype, *(tensor.dtype for tensor in touched)}
        scale = self._fp16_scale if torch.float16 in dtypes else 1.0
        while True:
            for tensor in touched:
                tensor.grad = None
            total = self._backward(scale)
            grads = [placed_as(parameter.grad, parameter) for parameter in parameters]
            if self._share.size > 1:
                total, grads = mean_over_ranks(total, parameters, grads)
            present = [grad for grad in grads if grad is not None]
            # An infinite loss stays so at any scale, and the optimizer refuses its gradient.
            if scale == 1.0 or not present or not total.isfinite():
                return total, grads
            if _unscale_(present, scale):
                # Not raised again: the further from the reference, the larger the gradient.
                self._fp16_scale = scale
                return total, grads
            scale /= 2

    def _backward(self, scale: float) -> Tensor:
        """Accumulate the gradients of all losses, times `scale`, and return the sum of the losses."""
        total = torch.zeros((), device=self._device())
        losses = self._losses([source.next_index() for source in self._sources])
        while True:
            with autocast(self.model, self.autocast_dtype):
                loss = next(losses, None)
            if loss is None:
                return total
            shape, requires_grad = tuple(getattr(loss, "shape", ())), getattr(loss, "requires_grad", False)
            if shape or not requires_grad:
                raise ValueError(
                    f"The alignment loss is a {type(loss).__name__}, shape {shape}, requires_grad "
                    f"{requires_grad}; expected a 0-dim tensor that depends on a trainable parameter."
                )
            # Not torch.autograd.grad: under data parallelism only backward() reduces.
            (loss * scale).backward()
            total = total + loss.detach().to(total.device)

    def _parts(self, source: SourceBatches, index: int, size: int | None = None) -> Iterator[Part]:
        return source.parts(index, self._share, size)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order of safety batches; `SafeGradOptimizer.state_dict` contains it."""
        state: dict[str, Any] = {"fp16_scale": self._fp16_scale}
        for suffix, source in self._named_sources():
            state |= {name + suffix: value for name, value in source.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch that was next when `state` was saved, of the same batches and seed."""
        unknown = sorted(state.keys() - self.state_dict().keys())
        if unknown:
            raise ValueError(
                f"The saved run had an alignment of another kind than {type(self).__name__}: its state has "
                f"{unknown} besides. Resume with the alignment, and the sources, of the saved run."
            )
        for suffix, source in self._named_sources():
            source.load_state_dict({name: state[name + suffix] for name in source.state_dict()})
        self._fp16_scale = state["fp16_scale"]

    def _named_sources(self) -> Iterator[tuple[str, SourceBatches]]:
        """The sources, each with how its names end in a state: those of the first as if it were alone."""
        for number, source in enumerate(self._sources):
            yield f"_{number}" if number else "", source


def _require_no_others(model: nn.Module, of_model: Sequence[Tensor], parameters: list[Tensor]) -> None:
    """Refuse gradients of the model that the optimizer which asks does not step by."""
    own = set(parameters)
    others = {tensor for tensor in of_model if tensor.grad is not None and tensor not in own}
    if others:
        first = next(name for name, tensor in model.named_parameters() if tensor in others)
        raise ValueError(
            f"{len(others)} parameters of the model have a gradient and are not of this optimizer (first: "
            f"{first}). Another one would move them unprotected, and the conflict is one over all. "
            "Freeze them if they are not trained; else wrap one optimizer of all, or a ChainedOptimizer."
        )


def _unscale_(grads: list[Tensor], scale: float) -> bool:
    """Divide gradients by the scale of their loss, in place, and say whether all ranks' are finite."""
    present = [local(grad) for grad in grads]
    divide_all_(present, scale)
    finite = torch.stack([grad.isfinite().all().to(present[0].device) for grad in present]).all()
    # Sharded gradients may be finite in the part of one rank only.
    return not on_any_rank(~finite)
