"""What a parallel model is to a rank: the module inside, leaves of our own, a share of the safety batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from safegrad_optim._torch_private import parameters_of
from safegrad_optim.parallel._fsdp import data_parallel_places, reshard
from safegrad_optim.parallel._tensors import is_distributed_tensor, world_size


def inner_module(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, whose own forward would arm its reducer; any other module as it is."""
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    if model.process_group.size() != world_size():
        raise NotImplementedError(
            f"DDP has a process group of {model.process_group.size()} of {world_size()} ranks; the "
            "alignment gradient would be averaged over all. Use one of all ranks."
        )
    inside: nn.Module = model.module
    return inside


@contextmanager
def own_leaves(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Put other leaves in the place of plain parameters where there are several ranks; by parameter.

    They have the same memory, and not the hooks of DDP, for which a backward pass counts as one of the
    user's, reduces early, or marks parameters as used.
    """
    places = [
        (parameters_of(module), name, parameter)
        for module in (model.modules() if world_size() > 1 else ())
        for name, parameter in parameters_of(module).items()
        if parameter is not None and parameter.requires_grad and not is_distributed_tensor(parameter)
    ]
    leaves: dict[Tensor, Tensor] = {}
    for _, _, parameter in places:
        leaves.setdefault(parameter, nn.Parameter(parameter.detach()))
    try:
        for own, name, parameter in places:
            own[name] = leaves[parameter]
        yield leaves
    finally:
        for own, name, parameter in places:
            own[name] = parameter


class Share(NamedTuple):
    """Which of how many shares of the safety batch a rank computes; tensor-parallel ranks have one share."""

    rank: int
    size: int


def share_of(model: nn.Module) -> Share:
    """Return which share of the safety batch this rank computes for a model."""
    _refuse_unsupported(model)
    if world_size() == 1:
        return Share(0, 1)
    # Unsharded parameters do not tell how they are sharded.
    reshard(model)
    shares = {Share(*place) for place in data_parallel_places(model)}
    sizes = {p.device_mesh.size() for p in model.parameters() if is_distributed_tensor(p)}
    if sizes and (len(shares) > 1 or max(sizes) != world_size()):
        raise NotImplementedError(
            f"The model is sharded over meshes of {sorted(sizes)} of {world_size()} ranks in {len(shares)} "
            "ways. Use one mesh of all ranks: FSDP2 (1-D or HSDP), tensor parallelism, or both."
        )
    if shares:
        return shares.pop()
    return Share(0, 1) if sizes else Share(dist.get_rank(), world_size())


def _refuse_unsupported(model: nn.Module) -> None:
    advice = "Use FSDP2: torch.distributed.fsdp.fully_shard."
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise NotImplementedError(
            f"The model is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters. {advice}"
        )
    # DeepSpeed's mark on parameters in ZeRO-3; what was tested is a stand-in.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(
            "The model is sharded by DeepSpeed ZeRO-3, which keeps gradients where no optimizer wrapper sees "
            f"them. {advice}"
        )
