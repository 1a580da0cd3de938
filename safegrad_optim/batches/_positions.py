"""Which positions of a batch are compared, and which rows hold several texts."""

from typing import Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100
Positions = Literal["response", "all"]
Batch = dict[str, Tensor]


def position_mask(batch: Batch, positions: Positions) -> Tensor:
    """Return the positions whose logits predict a compared token, (rows, length) bool.

    Logits at position t predict token t + 1: "response" selects t where `labels[t + 1]` is not -100,
    "all" where token t + 1 is not padding.
    """
    labels = batch["labels"]
    compared = labels != IGNORE_INDEX
    if positions == "all":
        compared = torch.ones_like(compared)
        if "attention_mask" in batch:
            compared = batch["attention_mask"].bool()
        elif is_packed(batch):
            # Padding has position 0; the first token of a text is predicted by none of its own.
            compared = batch["position_ids"] > 0
    return torch.nn.functional.pad(compared[:, 1:], (0, 1))


def is_packed(batch: Batch) -> bool:
    """Whether position ids alone tell texts and padding apart: an attention mask would join the texts."""
    return "position_ids" in batch and "attention_mask" not in batch


def with_mask(fields: Batch) -> Batch:
    """The fields of rows with an attention mask, of ones if they have none, unless it would join texts."""
    mask = {} if is_packed(fields) else {"attention_mask": torch.ones_like(fields["input_ids"])}
    return mask | fields


def starts_again(position_ids: Tensor) -> Tensor:
    """Return the positions that are not behind the one before, as bool; never the first of a row."""
    behind = position_ids[..., 1:] > position_ids[..., :-1]
    return torch.nn.functional.pad(~behind, (1, 0))
