"""Names that torch does not document (FSDP2's: `parallel/_fsdp.py`); all seen in torch 2.8 and 2.13."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Files of torch whose layers have no state beyond parameters and buffers.
_PLAIN = {f"torch.nn.modules.{name}" for name in ("container", "linear", "normalization")}
Tensors = tuple[Tensor, ...] | list[Tensor]


def version(tensor: Tensor) -> int:
    """Return a count that each write to the memory of a tensor raises."""
    return tensor._version


def is_dropout(module: nn.Module) -> bool:
    """Return whether a module is one of torch's dropouts, with its rate as `p`."""
    return isinstance(module, torch.nn.modules.dropout._DropoutNd)


def is_fixed_by_mode(module: nn.Module) -> bool:
    """Return whether the mode alone makes a module of torch random, or normalise over the batch."""
    return isinstance(module, torch.nn.modules.batchnorm._NormBase | nn.RReLU)


def is_plain_layer(module: nn.Module) -> bool:
    """Return whether a module is of a class of torch that notes nothing in attributes and has no rate."""
    return type(module).__module__ in _PLAIN


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor subclass is made of; of a plain one, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own parameters by name, to be replaced by tensors of any kind."""
    return module._parameters  # type: ignore[return-value]


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, to be replaced; also those that no state dict keeps."""
    return module._buffers


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether hooks run before or after a module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is the result of `torch.compile(module)` or of `module.compile()`."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def flattened(tensors: Tensors) -> Tensor:
    """Return tensors of one dtype one after the other, 1-D, by one call; a single one as a view."""
    flat: Tensor = torch._utils._flatten_dense_tensors(tensors)
    return flat


def unflattened(flat: Tensor, like: Tensors) -> Tensors:
    """Return views of a 1-D tensor in the shapes of others, in one call; up to 2.8 empty ones are (0,)."""
    views: Tensors = torch._utils._unflatten_dense_tensors(flat, like)
    return views


def copy_all_(targets: Tensors, sources: Tensors) -> None:
    """Copy each source into its target, in few kernels."""
    torch._foreach_copy_(targets, sources)


def divide_all_(tensors: Tensors, divisor: float) -> None:
    """Divide each tensor in place, in few kernels."""
    torch._foreach_div_(tensors, divisor)


def make_hook_registries(optimizer: Optimizer) -> None:
    """Do for hooks what `Optimizer.__init__` would, without its parameter groups and state."""
    Optimizer.__setstate__(optimizer, {})


def hook_registry(optimizer: Optimizer, place: str) -> dict[int, Callable[..., Any]]:
    """Return an optimizer's hooks of a place, such as `load_state_dict_pre`, in the order they run."""
    registry: dict[int, Callable[..., Any]] = getattr(optimizer, f"_optimizer_{place}_hooks")
    return registry


def share_gradient_hooks(tensor: Tensor, other: Tensor) -> None:
    """Have the hooks that a tensor's gradient goes through (`register_hook`) act on another's as well."""
    if tensor._backward_hooks:
        other._backward_hooks = tensor._backward_hooks


def without_global_step_hooks() -> AbstractContextManager[None]:
    """Take away the hooks on the steps of all optimizers."""
    return _emptied([_global_optimizer_pre_hooks, _global_optimizer_post_hooks])


def without_gradient_hooks(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Take away the hooks that are told when the gradient of a parameter has been accumulated."""
    return _emptied([hooks for tensor in parameters if (hooks := tensor._post_accumulate_grad_hooks)])


@contextmanager
def _emptied(registries: Sequence[dict[int, Any]]) -> Iterator[None]:
    # Emptied, because torch keeps the registry itself.
    kept = [(hooks, dict(hooks)) for hooks in registries]
    try:
        for hooks in registries:
            hooks.clear()
        yield
    finally:
        for hooks, own in kept:
            hooks.update(own)
