"""Is the reference the aligned model: before fine-tuning, the model is compared with it token by token."""

from collections.abc import Iterable

import torch
from torch import nn

from safegrad_optim.batches import Part
from safegrad_optim.forward import require_one_function, unchanged_training
from safegrad_optim.parallel import on_any_rank, synchronized
from safegrad_optim.reference import Reading

# In nats a token. A model and its reference differ by less in bf16; an unaligned one by far more.
_MOST_IN_MEAN = 0.05
# The token that opens a reply decides whether it refuses, and is little of the mean over a long one.
_MOST_AT_A_TOKEN = 0.3


@torch.no_grad()
def check_start(
    model: nn.Module, reading: Reading, parts: Iterable[Part], autocast_dtype: torch.dtype | None
) -> None:
    """Refuse a reference from which the model differs, at all compared tokens of the parts.

    Where the first part has no difference to the bit, as with fresh LoRA adapters, the others are not run.
    """
    total, count, largest = 0.0, 0, 0.0
    with synchronized(model):
        for number, part in enumerate(parts):
            if number == 0:
                require_one_function(model, part.inputs, part.mask, autocast_dtype)
            with unchanged_training(model, autocast_dtype):
                values = torch.stack(reading.divergences(model, part, of_each_token=True))
            if number == 0 and not on_any_rank((values != 0).any()):
                return
            total, count = total + float(values.sum()), count + len(values)
            largest = max(largest, float(values.max()))
    mean = total / count
    if on_any_rank(not (mean <= _MOST_IN_MEAN and largest <= _MOST_AT_A_TOKEN)):
        raise ValueError(
            f"Before fine-tuning the model already differs from its reference by KL = {mean:.3g} a token, "
            f"expected less than {_MOST_IN_MEAN}, and by {largest:.3g} at one, expected less than "
            f"{_MOST_AT_A_TOKEN}. If adapters hold the alignment, merge them (merge_and_unload) and add new "
            "ones; if ref_model is another model, give the aligned one; if weights were loaded since "
            "KLAlignment was built, build it afterwards; if the run is resumed, or trains virtual tokens, "
            "which change the model from the start (prompt tuning), give Reference(resumed=True)."
        )
