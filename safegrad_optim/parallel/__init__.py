"""Several ranks: the only place that knows process groups, DTensor, DDP and FSDP2.

In come tensors and modules that may be parallel in some way; out come the part that this rank holds, sums
and means over ranks, and this rank's share of a safety batch. In one process all of it is the identity.

>>> import torch
>>> from safegrad_optim.parallel import local, share_of, world_size
>>> world_size(), share_of(torch.nn.Linear(2, 2))
(1, Share(rank=0, size=1))
>>> tensor = torch.ones(2)
>>> local(tensor) is tensor
True
"""

from safegrad_optim.parallel._fsdp import synchronized
from safegrad_optim.parallel._models import Share, inner_module, own_leaves, share_of, sum_of_shards
from safegrad_optim.parallel._ranks import (
    mean_over_ranks,
    of_all_ranks,
    on_any_rank,
    require_same,
    sum_over_ranks,
)
from safegrad_optim.parallel._tensors import (
    Held,
    device_type,
    has_ranks,
    held,
    is_distributed_tensor,
    local,
    placed_as,
    whole,
    world_size,
)

# Of a tensor, of all ranks, of a model.
__all__ = ["Held", "device_type", "held", "is_distributed_tensor", "local", "placed_as", "whole"]
__all__ += ["mean_over_ranks", "of_all_ranks", "on_any_rank", "require_same", "sum_over_ranks"]
__all__ += ["has_ranks", "world_size"]
__all__ += ["Share", "inner_module", "own_leaves", "share_of", "sum_of_shards", "synchronized"]
