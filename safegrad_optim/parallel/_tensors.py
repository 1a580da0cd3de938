"""What a DTensor is to the rest of the library: the part a rank holds, and how it is placed.

Nothing here gathers a parameter or a gradient.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor, without importing torch.distributed.tensor."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, in the same memory."""
    if not is_distributed_tensor(tensor):
        return tensor
    with torch.no_grad():
        shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from the ranks that hold its parts, with its graph."""
    if not is_distributed_tensor(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def placement(tensor: Tensor) -> str:
    """Say how a tensor lies on the ranks, for comparison and for errors."""
    if not is_distributed_tensor(tensor):
        return "unsharded"
    distributed: Any = tensor
    return f"{distributed.placements} on {tuple(distributed.device_mesh.shape)} ranks"


def is_partial(tensor: Tensor) -> bool:
    """Return whether the sum over ranks that makes a tensor is still pending."""
    distributed: Any = tensor
    return is_distributed_tensor(tensor) and any(placed.is_partial() for placed in distributed.placements)


def placed_as(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient placed as its parameter: sums that tensor parallelism left pending are made."""
    if grad is None or not is_distributed_tensor(grad) or placement(grad) == placement(parameter):
        return grad
    target: Any = parameter
    placed: Tensor = grad.redistribute(target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return placed


def device_type(tensor: Tensor) -> str:
    """Return the type of the device a tensor is computed with, which CPU offload keeps it away from."""
    if not is_distributed_tensor(tensor):
        return tensor.device.type
    distributed: Any = tensor
    return str(distributed.device_mesh.device_type)
