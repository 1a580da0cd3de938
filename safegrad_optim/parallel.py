"""What the alignment has to know of a parallel model: DDP, FSDP2, HSDP, tensor parallelism.

FSDP2 has setters for what is read and restored here, but no getters: what begins with an underscore is
private to torch, and `tests/test_distributed.py` goes through all of it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from safegrad_optim.distributed import is_distributed_tensor, world_size

__all__ = ["Share", "inner_module", "own_leaves", "share_of", "synchronized"]


class Share(NamedTuple):
    """Which of how many shares of the safety batch a rank computes; tensor-parallel ranks have one share."""

    rank: int
    size: int


def inner_module(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, whose own forward would arm its reducer; any other module as it is.

    Raises:
        NotImplementedError: DDP has a process group of a part of the ranks.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if model.process_group.size() != world_size():
            raise NotImplementedError(
                f"DDP has a process group of {model.process_group.size()} of {world_size()} ranks; the "
                "alignment gradient would be averaged over all. Use one of all ranks."
            )
        inside: nn.Module = model.module
        return inside
    return model


def share_of(model: nn.Module) -> Share:
    """Return which share of the safety batch this rank computes for a model.

    Raises:
        NotImplementedError: the model is parallel in a way that is not supported.
    """
    _refuse_unsupported(model)
    if world_size() == 1:
        return Share(0, 1)
    # Unsharded parameters do not tell how they are sharded.
    _reshard(model)
    shares = {_share_of_group(group) for group in _fsdp_groups(model)}
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


def _share_of_group(group: Any) -> Share:
    """Place of this rank among the data-parallel ranks of an FSDP2 parameter group."""
    info = group.mesh_info
    if not hasattr(info, "shard_mesh_size"):
        raise NotImplementedError(
            "The model is replicated by torch's composable replicate(). Use DistributedDataParallel."
        )
    replicas = getattr(info, "replicate_mesh_size", 1)
    replica = getattr(info, "replicate_mesh_rank", 0)
    return Share(replica * info.shard_mesh_size + info.shard_mesh_rank, replicas * info.shard_mesh_size)


def _refuse_unsupported(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                "The model is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are flattened. "
                "Use FSDP2: torch.distributed.fsdp.fully_shard."
            )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(
            "The model is sharded by DeepSpeed ZeRO-3, which keeps gradients where no optimizer wrapper sees "
            "them. Use FSDP2: torch.distributed.fsdp.fully_shard."
        )


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _fsdp_groups(model: nn.Module) -> list[Any]:
    groups: list[Any] = []
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        # Older torch has one group at most.
        groups += getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def _reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps unsharded after a forward without backward: it would outlive an update."""
    for module in _fsdp_modules(model):
        module.reshard()


@contextmanager
def synchronized(model: nn.Module) -> Iterator[None]:
    """Have FSDP2 average the gradients of each backward pass, whatever it is set to, and reshard at the end.

    Raises:
        RuntimeError: a gradient of the user is accumulated but not reduced yet; it would be mixed in.
    """
    settings: dict[str, Any] = {
        "reduce_grads": True,
        "all_reduce_grads": True,
        "gradient_divide_factor": None,
    }
    groups = _fsdp_groups(model)
    for group in groups:
        if group._partial_reduce_output is not None or any(map(_is_pending, group.fsdp_params)):
            raise RuntimeError(
                "FSDP2 holds a user gradient that is not reduced yet. Call "
                "set_requires_gradient_sync(True) before the last backward() of a step."
            )
    contexts = [module._get_fsdp_state()._state_ctx for module in _fsdp_modules(model)]
    saved = [(group, {name: getattr(group, name) for name in settings}) for group in groups]
    last = [(context, context.is_last_backward) for context in contexts]
    try:
        for group in groups:
            vars(group).update(settings)
        for context in contexts:
            # Else the reduction may still be under way when the gradients are read.
            context.is_last_backward = True
        yield
    finally:
        _reshard(model)
        for group, values in saved:
            vars(group).update(values)
        for context, flag in last:
            context.is_last_backward = flag


def _is_pending(sharded: Any) -> bool:
    unsharded = getattr(sharded, "_unsharded_param", None)
    accumulated = unsharded is not None and unsharded.grad is not None
    return accumulated or sharded.unsharded_accumulated_grad is not None


@contextmanager
def own_leaves(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Put other leaves in the place of plain parameters, in the same memory, where there are several ranks.

    DDP's hooks are on its own parameters: a backward pass to them counts as one of the user's, reduces
    early, or marks parameters as used. Nothing of that happens to these leaves.

    Returns:
        The leaf of each trainable parameter that has one.
    """
    leaves: dict[Tensor, Tensor] = {}
    places = []
    if world_size() > 1:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or is_distributed_tensor(parameter):
                    continue
                leaves.setdefault(parameter, nn.Parameter(parameter.detach()))
                places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            module._parameters[name] = leaves[parameter]  # type: ignore[assignment]
        yield leaves
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
