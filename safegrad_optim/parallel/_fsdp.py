"""FSDP2: its private state, read and restored around an alignment pass, because its setters have no getters.

Underscored names and `mesh_info` are private; seen in torch 2.8 (first with `gradient_divide_factor`), 2.13.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from safegrad_optim.parallel._tensors import has_ranks


def _fsdp_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp") if has_ranks() else None
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _fsdp_groups(model: nn.Module) -> list[Any]:
    groups: list[Any] = []
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        # torch 2.8 has one group at most.
        groups += getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]


def data_parallel_places(model: nn.Module) -> set[tuple[int, int]]:
    """Return place and number of data-parallel ranks, one pair for each way in which the model is sharded."""
    places = set()
    for mesh in (group.mesh_info for group in _fsdp_groups(model)):
        if not hasattr(mesh, "shard_mesh_size"):
            raise NotImplementedError("The model is in torch's replicate(). Use DistributedDataParallel.")
        replica, replicas = getattr(mesh, "replicate_mesh_rank", 0), getattr(mesh, "replicate_mesh_size", 1)
        size = mesh.shard_mesh_size
        places.add((replica * size + mesh.shard_mesh_rank, replicas * size))
    return places


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 keeps unsharded after a forward without backward: it would outlive an update."""
    for module in _fsdp_modules(model):
        module.reshard()


@contextmanager
def synchronized(model: nn.Module) -> Iterator[None]:
    """Have FSDP2 average the gradients of each backward pass, however it is set, and reshard at the end."""
    settings = {"reduce_grads": True, "all_reduce_grads": True, "gradient_divide_factor": None}
    groups = _fsdp_groups(model)
    for group in groups:
        # Else that gradient would be mixed into those of the pass.
        if group._partial_reduce_output is not None or any(map(_is_pending, group.fsdp_params)):
            raise RuntimeError(
                "FSDP2 holds a user gradient that is not reduced yet. Call "
                "set_requires_gradient_sync(True) before the last backward() of a step."
            )
    # But in the last backward, the reduction may still be under way when the gradients are read.
    contexts = [module._get_fsdp_state()._state_ctx for module in _fsdp_modules(model)]
    changed = [(group, settings) for group in groups]
    changed += [(context, {"is_last_backward": True}) for context in contexts]
    saved = [(holder, {name: getattr(holder, name) for name in values}) for holder, values in changed]
    try:
        for holder, values in changed:
            vars(holder).update(values)
        yield
    finally:
        reshard(model)
        for holder, values in saved:
            vars(holder).update(values)


def _is_pending(sharded: Any) -> bool:
    unsharded = getattr(sharded, "_unsharded_param", None)
    accumulated = unsharded is not None and unsharded.grad is not None
    return accumulated or sharded.unsharded_accumulated_grad is not None
