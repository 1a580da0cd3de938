"""From whatever rows the user has to a list of checked batches."""

import ctypes
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

IGNORE_INDEX = -100
Positions = Literal["response", "all"]

Batch = dict[str, Tensor]
SafetyBatches = Iterable[Mapping[str, Any]] | Mapping[str, Any]


def as_batches(safety_batches: SafetyBatches, *, positions: Positions, batch_size: int) -> list[Batch]:
    """Return safety batches as a list of right-padded model inputs, each checked.

    They are batches of 2-D `input_ids` and `labels` (a list, a DataLoader, or one batch), or single 1-D
    rows (a list or a Dataset), which are grouped by `batch_size` in their order.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}, expected 'response' or 'all'.")
    items = [safety_batches] if isinstance(safety_batches, Mapping) else list(safety_batches)
    if not items:
        raise ValueError("The safety batches are empty. Give at least one batch with a response.")
    batches = [_tensors(item, index) for index, item in enumerate(items)]
    if all(item["labels"].dim() == 1 for item in batches):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected a whole number >= 1.")
        starts = range(0, len(batches), batch_size)
        batches = [_pad_together(batches[start : start + batch_size]) for start in starts]
    for index, batch in enumerate(batches):
        _check(batch, index, positions)
    return batches


def add_contents(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Add the names, shapes, dtypes and contents of tensors on the CPU to a digest."""
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        # By address, because neither numpy nor a uint8 view is there for every dtype and setup.
        tensor = value.contiguous()
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def position_mask(batch: Batch, positions: Positions) -> Tensor:
    """Return the positions whose logits predict a compared token, (rows, length) bool.

    Logits at position t predict token t + 1: "response" selects t where `labels[t + 1]` is not -100,
    "all" where token t + 1 is not padding.
    """
    labels = batch["labels"]
    everything = batch.get("attention_mask", torch.ones_like(labels)).bool()
    compared = labels != IGNORE_INDEX if positions == "response" else everything
    return torch.nn.functional.pad(compared[:, 1:], (0, 1))


def _tensors(item: Any, index: int) -> Batch:
    if not isinstance(item, Mapping):
        raise TypeError(f"Safety batch {index} is a {type(item).__name__}, expected a mapping with 'labels'.")
    for name in ("input_ids", "labels"):
        if name not in item:
            raise ValueError(
                f"Safety batch {index} has {sorted(item)} but no '{name}'. Give model inputs with labels "
                f"that are {IGNORE_INDEX} outside the response."
            )
    batch = {}
    for name, value in item.items():
        try:
            batch[name] = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"Safety batch {index}: '{name}' is a {type(value).__name__} that makes no tensor "
                f"({error}). Remove it, or collate to tensors first."
            ) from error
    return batch


def _pad_together(rows: list[Batch]) -> Batch:
    rows = [{"attention_mask": torch.ones_like(row["input_ids"]), **row} for row in rows]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"Safety rows have different fields: {[sorted(row) for row in rows]}.")
    batch = {}
    for name in rows[0]:
        padding = IGNORE_INDEX if name == "labels" else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, padding)
    return batch


def _check(batch: Batch, index: int, positions: Positions) -> None:
    input_ids, labels = batch["input_ids"], batch["labels"]
    if input_ids.dim() != 2 or input_ids.shape != labels.shape:
        raise ValueError(
            f"Safety batch {index}: input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)} "
            "have to be of one shape (rows, length)."
        )
    if not position_mask(batch, positions).any():
        found = f"Safety batch {index} has no response token: all labels after the first are {IGNORE_INDEX}"
        raise ValueError(f"{found}. Label the response with its ids; check that truncation has left some.")
