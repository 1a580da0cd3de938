"""The alignment gradient: the gradient of a loss on safety batches, one tensor per parameter."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim.distributed import require_single_process
from safegrad_optim.forward import device_type, unchanged_evaluation
from safegrad_optim.safety_batches import Batch, BatchOrder, Positions, as_batches, position_mask

__all__ = ["Alignment", "SafetyBatches"]

# Gradients near the reference are below fp16's range; GradScaler starts here too.
_FP16_SCALE = 2.0**16

SafetyBatches = Iterable[Mapping[str, Any]] | Mapping[str, Any]


class Alignment(ABC):
    """Gradient of a loss on the next safety batch, with the model and its `.grad` left as they were."""

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
        require_single_process()
        self.model = model
        self.batches = as_batches(safety_batches, positions=positions, batch_size=batch_size)
        self.positions = positions
        self.autocast_dtype = autocast_dtype
        self.last_loss: Tensor | None = None
        """Alignment loss of the last call, a 0-dim tensor on the model's device."""
        self._order = BatchOrder(len(self.batches), seed)
        self._fp16_scale = _FP16_SCALE

    @abstractmethod
    def _losses(self, index: int) -> Iterator[Tensor]:
        """Yield losses that add up to the alignment loss of one batch, each with its own graph."""

    def __call__(self, parameters: list[Tensor]) -> list[Tensor | None]:
        """Return the gradient of the alignment loss on the next safety batch.

        Args:
            parameters: the tensors to differentiate by, as `SafeGradOptimizer` passes them.

        Returns:
            One gradient for each, `None` where the loss does not depend on it.

        Raises:
            ValueError: the loss depends on no trainable parameter, or the reference is no longer the
                aligned model.
        """
        require_single_process()
        stashed = {tensor: tensor.grad for tensor in (*self.model.parameters(), *parameters)}
        for tensor in stashed:
            tensor.grad = None
        try:
            with unchanged_evaluation(self.model), torch.enable_grad():
                total, grads = self._scaled_backward(parameters, list(stashed))
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
            grads = [parameter.grad for parameter in parameters]
            present = [grad for grad in grads if grad is not None]
            # An infinite loss stays so at any scale, and the optimizer refuses its gradient.
            if scale == 1.0 or not present or not total.isfinite():
                return total, grads
            torch._foreach_div_(present, scale)
            if torch.stack([grad.isfinite().all().to(total.device) for grad in present]).all():
                # Not raised again: the further from the reference, the larger the gradient.
                self._fp16_scale = scale
                return total, grads
            scale /= 2
            for tensor in touched:
                tensor.grad = None

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
        return torch.autocast(device_type(model), self.autocast_dtype, enabled=enabled, cache_enabled=False)

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

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _inputs(self, index: int) -> tuple[Batch, Tensor]:
        """Model inputs of a batch without its labels, and the mask of the compared positions."""
        batch, device = self.batches[index], self._device()
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        return inputs, position_mask(batch, self.positions).to(device)


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
