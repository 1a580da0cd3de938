"""What a tensor is to a rank: the part that it holds, and how the tensor is placed.

Nothing here gathers a parameter or a gradient.
"""

import math
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


class Held(NamedTuple):
    """What a rank holds of a tensor."""

    local: Tensor
    """Its part, in the same memory."""
    placement: str
    """How the tensor lies on the ranks, for comparison and for errors."""
    copies: int
    """How many ranks hold the same elements."""
    is_sharded: bool
    is_pending: bool
    """Whether the sum over ranks that makes the tensor has not been made yet."""


def held(tensor: Tensor) -> Held:
    """Return what this rank holds of a tensor, and how the tensor is placed."""
    if not is_distributed_tensor(tensor):
        return Held(tensor, placement(tensor), world_size(), is_sharded=False, is_pending=False)
    distributed: Any = tensor
    mesh = distributed.device_mesh
    replicated = (mesh.size(dim) for dim, p in enumerate(distributed.placements) if p.is_replicate())
    return Held(
        local(tensor),
        placement(tensor),
        int(math.prod(replicated)) * world_size() // int(mesh.size()),
        is_sharded=True,
        is_pending=any(placed.is_partial() for placed in distributed.placements),
    )
