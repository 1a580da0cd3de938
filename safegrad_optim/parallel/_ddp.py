"""DistributedDataParallel: the module inside, and leaves that its hooks do not see."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from safegrad_optim._torch_private import parameters_of
from safegrad_optim.parallel._tensors import is_distributed_tensor, world_size


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
            for name, parameter in parameters_of(module).items():
                if parameter is None or not parameter.requires_grad or is_distributed_tensor(parameter):
                    continue
                leaves.setdefault(parameter, nn.Parameter(parameter.detach()))
                places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            parameters_of(module)[name] = leaves[parameter]
        yield leaves
    finally:
        for module, name, parameter in places:
            parameters_of(module)[name] = parameter
