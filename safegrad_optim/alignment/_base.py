"""The alignment gradient: the gradient of a loss on safety batches, one tensor per parameter."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim.batches import (
    Batch,
    BatchOrder,
    Positions,
    as_batches,
    contents_digest,
    position_mask,
)
from safegrad_optim.forward import device_type_of, unchanged_evaluation
from safegrad_optim.parallel import (
    Share,
    inner_module,
    local,
    mean_over_ranks,
    own_leaves,
    placed_as,
    require_same,
    share_of,
    sum_over_ranks,
    synchronized,
    world_size,
)

# Gradients near the reference are below fp16's range; GradScaler starts here too.
_FP16_SCALE = 2.0**16

SafetyBatches = Iterable[Mapping[str, Any]] | Mapping[str, Any]


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
        self.batches = as_batches(safety_batches, positions=positions, batch_size=batch_size)
        self._share = share_of(self.model)
        require_same(
            {
                "safety batches": contents_digest(self.batches, positions)[:12],
                "seed": seed,
                "autocast_dtype": autocast_dtype,
            },
            "Give every rank all safety rows and the same options; rows are split over ranks in here.",
        )
        self.positions = positions
        self.autocast_dtype = autocast_dtype
        self.last_loss: Tensor | None = None
        """Alignment loss of the last call, a 0-dim tensor on the model's device."""
        self._order = BatchOrder(len(self.batches), seed)
        self._fp16_scale = _FP16_SCALE

    @abstractmethod
    def _losses(self, index: int) -> Iterator[Tensor]:
        """Yield losses whose sums on the ranks have the mean of the alignment loss of one batch.

        Each has its own graph, and all ranks yield as many: FSDP2 communicates in each pass.
        """

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
        self._order.advance()
        return grads

    def _scaled_backward(
        self, parameters: list[Tensor], touched: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Loss and gradients of the next batch; in fp16 of a scaled loss, so that they do not underflow."""
        scale = self._fp16_scale if self._is_fp16() else 1.0
        while True:
            total = self._backward(self._losses(self._order.peek()), scale)
            grads = [placed_as(parameter.grad, parameter) for parameter in parameters]
            if self._share.size > 1:
                total, grads = mean_over_ranks(total, parameters, grads)
            present = [grad for grad in grads if grad is not None]
            # An infinite loss stays so at any scale, and the optimizer refuses its gradient.
            if scale == 1.0 or not present or not total.isfinite():
                return total, grads
            present = [local(grad) for grad in present]
            torch._foreach_div_(present, scale)
            if self._all_finite(present):
                # Not raised again: the further from the reference, the larger the gradient.
                self._fp16_scale = scale
                return total, grads
            scale /= 2
            for tensor in touched:
                tensor.grad = None

    def _all_finite(self, grads: list[Tensor]) -> bool:
        finite = torch.stack([grad.isfinite().all().to(self._device()) for grad in grads]).all()
        if world_size() > 1:
            # Sharded gradients may be finite in the part of one rank only.
            return not bool(sum_over_ranks((~finite).float()))
        return bool(finite)

    def _is_fp16(self) -> bool:
        # Also with adapters in fp32 on a model in fp16: the gradients that reach them are in fp16.
        parameters = self.model.parameters()
        return torch.float16 in {self.autocast_dtype, *(parameter.dtype for parameter in parameters)}

    def _backward(self, losses: Iterator[Tensor], scale: float) -> Tensor:
        """Accumulate the gradients of all losses, times `scale`, and return the sum of the losses."""
        total = torch.zeros((), device=self._device())
        while True:
            with self._autocast(self.model):
                loss = next(losses, None)
            if loss is None:
                return total
            _check_loss(loss)
            # Not torch.autograd.grad: under data parallelism only backward() reduces.
            (loss if scale == 1.0 else loss * scale).backward()
            total = total + loss.detach().to(total.device)

    def _autocast(self, model: nn.Module) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        # Its weight cache would serve weights cast for the reference, without a graph, to the model.
        return torch.autocast(
            device_type_of(model), self.autocast_dtype, enabled=enabled, cache_enabled=False
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order of safety batches; `SafeGradOptimizer.state_dict` contains it."""
        return {**self._order.state_dict(), "fp16_scale": self._fp16_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the safety batch that would have been next when `state` was saved.

        Raises:
            ValueError: the state is of another number of safety batches or another seed.
        """
        self._order.load_state_dict(state)
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

    def _parts(self, index: int, size: int | None = None) -> Iterator["Part"]:
        """This rank's share of a batch, `size` rows at a time, and as many parts on every rank."""
        batch, device = self.batches[index], self._device()
        mask = position_mask(batch, self.positions)
        shares = [_row_groups(mask, Share(rank, self._share.size), size) for rank in range(self._share.size)]
        own = shares[self._share.rank]
        # Where others have more rows, some row once more, for nothing but the collectives in the passes.
        spare = own[0] if own else mask.any(dim=1).nonzero()[:1, 0]
        for number in range(max(map(len, shares))):
            counts = number < len(own)
            rows = own[number] if counts else spare
            chosen = batch if len(rows) == len(mask) else _select(batch, rows)
            tensors = {name: value.to(device) for name, value in chosen.items()}
            labels = tensors.pop("labels")
            yield Part(tensors, mask[rows].to(device), labels, 1.0 if counts else 0.0)

    def _mean_tokens(self, index: int) -> float:
        """Compared tokens of a batch, divided by the number of ranks that share them."""
        return int(position_mask(self.batches[index], self.positions).sum()) / self._share.size


class Part(NamedTuple):
    """Some rows of a safety batch, on the model's device."""

    inputs: Batch
    """Model inputs, without labels."""
    mask: Tensor
    """The compared positions."""
    labels: Tensor
    weight: float
    """1, or 0 where another rank's rows are run to keep pace."""


def _row_groups(mask: Tensor, share: Share, size: int | None) -> list[Tensor]:
    """Rows of one share in groups of `size`, without groups that have nothing to compare."""
    rows = torch.arange(len(mask))[share.rank :: share.size]
    groups = rows.split(size or max(1, len(rows)))
    return [group for group in groups if mask[group].any()]


def _select(batch: Batch, rows: Tensor) -> Batch:
    for name, value in batch.items():
        if value.shape[:1] != batch["labels"].shape[:1]:
            raise ValueError(
                f"'{name}' of a safety batch has shape {tuple(value.shape)}, not one entry for each of the "
                f"{len(batch['labels'])} rows, so that the rows cannot be split over ranks or micro-batches. "
                "Leave it out, or expand it to all rows."
            )
    return {name: value[rows] for name, value in batch.items()}


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
