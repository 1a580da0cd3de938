"""What the library needs to know of torch.distributed: today, when to refuse."""

import sys

import torch
from torch import Tensor

__all__ = ["is_distributed_tensor", "require_single_process"]


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor, without importing torch.distributed.tensor."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def require_single_process() -> None:
    """Refuse to compute an alignment gradient that would differ between ranks.

    Raises:
        NotImplementedError: a process group of more than one rank is initialised.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"Found a process group of {torch.distributed.get_world_size()} ranks: each would use an "
            "alignment gradient of its own and the replicas would drift apart. Train in one process."
        )
