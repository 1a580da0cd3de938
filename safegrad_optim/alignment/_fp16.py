"""Loss scaling in fp16: gradients near the reference are below its range."""

import torch
from torch import Tensor, nn

from safegrad_optim._torch_private import divide_all_
from safegrad_optim.parallel import local, on_any_rank

# GradScaler starts here too.
FIRST_SCALE = 2.0**16


def is_fp16(model: nn.Module, autocast_dtype: torch.dtype | None) -> bool:
    """Whether gradients pass through fp16, as they do to fp32 adapters on a model in fp16."""
    return torch.float16 in {autocast_dtype, *(parameter.dtype for parameter in model.parameters())}


def unscale_(grads: list[Tensor], scale: float) -> bool:
    """Divide gradients by the scale of their loss, in place, and say whether all ranks' are finite."""
    present = [local(grad) for grad in grads]
    divide_all_(present, scale)
    finite = torch.stack([grad.isfinite().all().to(present[0].device) for grad in present]).all()
    # Sharded gradients may be finite in the part of one rank only.
    return not on_any_rank(~finite)
