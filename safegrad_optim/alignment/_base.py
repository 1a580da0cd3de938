"""The alignment gradient: the gradient of a loss on safety batches, one tensor per parameter."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim.alignment._fp16 import FIRST_SCALE, is_fp16, unscale_
from safegrad_optim.alignment._source import SafetySource
from safegrad_optim.batches import Part, Positions, SafetyBatches, as_batches, contents_digest
from safegrad_optim.forward import autocast, unchanged_evaluation
from safegrad_optim.parallel import (
    inner_module,
    mean_over_ranks,
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
        self,
        model: nn.Module,
        safety_batches: SafetyBatches,
        *,
        positions: Positions,
        batch_size: int,
        seed: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.model = inner_module(model)
        batches = as_batches(safety_batches, positions=positions, batch_size=batch_size)
        self._sources = (SafetySource(batches, positions=positions, seed=seed),)
        self._share = share_of(self.model)
        require_same(
            {
                "safety batches": contents_digest(batches, positions)[:12],
                "seed": seed,
                "autocast_dtype": autocast_dtype,
            },
            "Give every rank all safety rows and the same options; rows are split over ranks in here.",
        )
        self.autocast_dtype = autocast_dtype
        self.last_loss: Tensor | None = None
        """Alignment loss of the last call, a 0-dim tensor on the model's device."""
        self._fp16_scale = FIRST_SCALE

    @abstractmethod
    def _source_losses(self, source: SafetySource, index: int) -> Iterator[Tensor]:
        """Yield losses whose sums on the ranks have the mean of the loss of one batch of a source.

        Each has its own graph, and all ranks yield as many: FSDP2 communicates in each pass.
        """

    def _losses(self, index: int | None = None) -> Iterator[Tensor]:
        """Yield the losses of the next batch of each source, or of a certain one, by their weights."""
        for source in self._sources:
            place = source.order.peek() if index is None else index
            for loss in self._source_losses(source, place):
                yield loss if source.weight == 1.0 else source.weight * loss

    def __call__(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """Return the gradient of the alignment loss on the next safety batch.

        Args:
            parameters: the tensors to differentiate by, as `SafeGradOptimizer` passes them.

        Returns:
            One gradient for each, `None` where the loss does not depend on it.

        Raises:
            ValueError: the loss depends on no trainable parameter, or the reference is no longer the
                aligned model.
            RuntimeError: the model was made parallel, or in another way, since this was built.
            NotImplementedError: the model is parallel in a way that is not supported.
        """
        self._check_share()
        with synchronized(self.model), own_leaves(self.model) as leaves:
            own = [leaves.get(parameter, parameter) for parameter in parameters]
            stashed = {tensor: tensor.grad for tensor in (*self.model.parameters(), *own)}
            for tensor in stashed:
                tensor.grad = None
            try:
                with unchanged_evaluation(self.model), torch.enable_grad():
                    total, grads = self._scaled_backward(own, list(stashed))
            finally:
                for tensor, grad in stashed.items():
                    tensor.grad = grad
        self.last_loss = total
        for source in self._sources:
            source.order.advance()
        return grads

    def _scaled_backward(
        self, parameters: list[Tensor], touched: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of the next batch; in fp16 of a scaled loss, so that they do not underflow."""
        scale = self._fp16_scale if is_fp16(self.model, self.autocast_dtype) else 1.0
        while True:
            total = self._backward(self._losses(), scale)
            grads = [placed_as(parameter.grad, parameter) for parameter in parameters]
            if self._share.size > 1:
                total, grads = mean_over_ranks(total, parameters, grads)
            present = [grad for grad in grads if grad is not None]
            # An infinite loss stays so at any scale, and the optimizer refuses its gradient.
            if scale == 1.0 or not present or not total.isfinite():
                return total, grads
            if unscale_(present, scale):
                # Not raised again: the further from the reference, the larger the gradient.
                self._fp16_scale = scale
                return total, grads
            scale /= 2
            for tensor in touched:
                tensor.grad = None

    def _backward(self, losses: Iterator[Tensor], scale: float) -> Tensor:
        """Accumulate the gradients of all losses, times `scale`, and return the sum of the losses."""
        total = torch.zeros((), device=self._device())
        while True:
            with autocast(self.model, self.autocast_dtype):
                loss = next(losses, None)
            if loss is None:
                return total
            _check_loss(loss)
            # Not torch.autograd.grad: under data parallelism only backward() reduces.
            (loss if scale == 1.0 else loss * scale).backward()
            total = total + loss.detach().to(total.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order of safety batches; `SafeGradOptimizer.state_dict` contains it."""
        places = {
            f"{name}{_suffix(number)}": value
            for number, source in enumerate(self._sources)
            for name, value in source.order.state_dict().items()
        }
        return {**places, "fp16_scale": self._fp16_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the safety batch that would have been next when `state` was saved.

        Raises:
            ValueError: the state is of another number of safety batches or another seed.
        """
        for number, source in enumerate(self._sources):
            own = {name: state[f"{name}{_suffix(number)}"] for name in source.order.state_dict()}
            source.order.load_state_dict(own)
        self._fp16_scale = state["fp16_scale"]

    def _check_share(self) -> None:
        share = share_of(self.model)
        if share != self._share:
            raise RuntimeError(
                f"This rank computes share {share.rank} of {share.size} of each safety batch, but the "
                f"alignment was built for share {self._share.rank} of {self._share.size}. Build it after "
                "init_process_group() and after fully_shard() or parallelize_module()."
            )

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _parts(self, source: SafetySource, index: int, size: int | None = None) -> Iterator[Part]:
        """This rank's parts of a batch, `size` rows at a time."""
        return source.parts(index, self._share, self._device(), size)

    def _mean_tokens(self, source: SafetySource, index: int) -> float:
        """Compared tokens of a batch, divided by the number of ranks that share them."""
        return source.tokens(index) / self._share.size


def _suffix(number: int) -> str:
    # Without one for the first source, as when there was only one.
    return f"_{number}" if number else ""


def _check_loss(loss: Tensor) -> None:
    if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
        found = (
            f"shape {tuple(loss.shape)}, requires_grad {loss.requires_grad}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise ValueError(
            f"The alignment loss has {found}; expected a 0-dim tensor that depends on a trainable "
            "parameter. Check that the model has trainable parameters and the loss uses it."
        )
