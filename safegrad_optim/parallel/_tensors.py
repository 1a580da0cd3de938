"""What a tensor is to a rank: the part that it holds, and how the tensor is placed; nothing is gathered."""

import math
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def has_ranks() -> bool:
    """Return whether there is a process group, without which no model is parallel."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if has_ranks() else 1


def is_distributed_tensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether `tensor` is a DTensor, without importing torch.distributed.tensor."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, in the same memory."""
    if not is_distributed_tensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from the ranks that hold its parts, with its graph."""
    return tensor.full_tensor() if is_distributed_tensor(tensor) else tensor


def placed_as(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient placed as its parameter: sums that tensor parallelism left pending are made."""
    if grad is None or not is_distributed_tensor(grad) or not is_distributed_tensor(parameter):
        return grad
    if _placement(grad) == _placement(parameter):
        return grad
    return grad.redistribute(parameter.device_mesh, parameter.placements)


def device_type(tensor: Tensor) -> str:
    """Return the type of the device a tensor is computed with, which CPU offload keeps it away from."""
    return tensor.device_mesh.device_type if is_distributed_tensor(tensor) else tensor.device.type


class Held(NamedTuple):
    """What a rank holds of a tensor."""

    local: Tensor  # its part, in the same memory
    placement: str  # how the tensor lies on the ranks, for comparison and for errors
    copies: int  # how many ranks hold the same elements
    is_sharded: bool
    is_pending: bool  # whether the sum over ranks that makes the tensor has not been made yet


def held(tensor: Tensor) -> Held:
    """Return what this rank holds of a tensor, and how the tensor is placed."""
    if not is_distributed_tensor(tensor):
        return Held(tensor, "unsharded", world_size(), is_sharded=False, is_pending=False)
    mesh, placements = tensor.device_mesh, tensor.placements
    replicas = math.prod(mesh.size(dim) for dim, placed in enumerate(placements) if placed.is_replicate())
    copies = replicas * world_size() // mesh.size()
    is_pending = any(placed.is_partial() for placed in placements)
    return Held(local(tensor), _placement(tensor), copies, is_sharded=True, is_pending=is_pending)


def _placement(tensor: "DTensor") -> str:
    return f"{tensor.placements} on {tuple(tensor.device_mesh.shape)} ranks"
