"""What a parallel model is to a rank: the module inside, its own leaves and shards, a share of a batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safegrad_optim._torch_private import parameters_of, share_gradient_hooks
from safegrad_optim.parallel._fsdp import data_parallel_places, reshard
from safegrad_optim.parallel._ranks import sum_over_ranks
from safegrad_optim.parallel._tensors import is_distributed_tensor, local, world_size


def inner_module(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, whose own forward would arm its reducer; any other module as it is."""
    if isinstance(model, nn.DataParallel):
        raise NotImplementedError(
            "The model is a DataParallel, which copies its .module at each pass. Give that .module, or "
            "use DistributedDataParallel."
        )
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
    leaves: dict[Tensor, Tensor] = {parameter: nn.Parameter(parameter.detach()) for _, _, parameter in places}
    for parameter, leaf in leaves.items():
        # Of the user, such as a mask, where DDP's are in C++.
        share_gradient_hooks(parameter, leaf)
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
    advice = "Use FSDP2: torch.distributed.fsdp.fully_shard."
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise NotImplementedError(f"The model is in FSDP1, which flattens parameters. {advice}")
    # DeepSpeed's mark on parameters in ZeRO-3.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(f"The model is in DeepSpeed ZeRO-3, which hides its gradients. {advice}")
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


def sum_of_shards(parameters: Sequence[Tensor], sums: Sequence[int]) -> list[int]:
    """Add up, modulo 2^64, the integers that each rank found in its parts of parameters, each part once."""
    sharded = [parameter for parameter in parameters if is_distributed_tensor(parameter)]
    if not sharded:
        return list(sums)
    own = [value if _is_first_copy(tensor) else 0 for tensor, value in zip(parameters, sums, strict=True)]
    total: list[int] = sum_over_ranks(torch.tensor(own, device=local(sharded[0]).device)).tolist()
    return total


def _is_first_copy(tensor: Tensor) -> bool:
    if not is_distributed_tensor(tensor):
        return dist.get_rank() == 0
    mesh = tensor.device_mesh
    # A mesh of a part of the ranks has a twin for each of the others.
    if not bool((mesh.mesh == 0).any()):
        return False
    places = zip(mesh.get_coordinate() or (), tensor.placements, strict=True)
    return not any(index > 0 and placed.is_replicate() for index, placed in places)
