"""Which rows of a safety batch a rank computes, and which parallel models are refused."""

from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from safegrad_optim.parallel._fsdp import data_parallel_places, reshard
from safegrad_optim.parallel._tensors import is_distributed_tensor, world_size


class Share(NamedTuple):
    """Which of how many shares of the safety batch a rank computes; tensor-parallel ranks have one share."""

    rank: int
    size: int


def share_of(model: nn.Module) -> Share:
    """Return which share of the safety batch this rank computes for a model.

    Raises:
        NotImplementedError: the model is parallel in a way that is not supported.
    """
    _refuse_unsupported(model)
    if world_size() == 1:
        return Share(0, 1)
    # Unsharded parameters do not tell how they are sharded.
    reshard(model)
    shares = {Share(*place) for place in data_parallel_places(model)}
    sizes = {
        int(parameter.device_mesh.size())  # type: ignore[attr-defined]
        for parameter in model.parameters()
        if is_distributed_tensor(parameter)
    }
    if sizes and (len(shares) > 1 or max(sizes) != world_size()):
        raise NotImplementedError(
            f"The model is sharded over meshes of {sorted(sizes)} of {world_size()} ranks in {len(shares)} "
            "ways. Use one mesh of all ranks: FSDP2 (1-D or HSDP), tensor parallelism, or both."
        )
    if shares:
        return shares.pop()
    return Share(0, 1) if sizes else Share(dist.get_rank(), world_size())


def _refuse_unsupported(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                "The model is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are flattened. "
                "Use FSDP2: torch.distributed.fsdp.fully_shard."
            )
    # DeepSpeed's mark on parameters in ZeRO-3; what was tested is a stand-in.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(
            "The model is sharded by DeepSpeed ZeRO-3, which keeps gradients where no optimizer wrapper sees "
            "them. Use FSDP2: torch.distributed.fsdp.fully_shard."
        )
