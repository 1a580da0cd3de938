"""From whatever rows the user has to a list of checked batches."""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, get_args

import torch
from torch import Tensor

from safegrad_optim.batches._checks import check_batch
from safegrad_optim.batches._positions import IGNORE_INDEX, Batch, Positions, with_mask

SafetyBatches = Iterable[Mapping[str, Any]] | Mapping[str, Any]

# Items read of what does not say how many it has: far more than a safety set, far less than a memory.
_MOST_READ = 100_000


def as_batches(safety_batches: SafetyBatches, *, positions: Positions, batch_size: int) -> list[Batch]:
    """Return safety batches as a list of right-padded model inputs, each checked.

    They are batches of 2-D `input_ids` and `labels` (a list, a DataLoader, or one batch), or single 1-D
    rows (a list or a Dataset), which are grouped by `batch_size` in their order.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions is {positions!r}, expected 'response' or 'all'.")
    given = [safety_batches] if isinstance(safety_batches, Mapping) else safety_batches
    # Copied one after another: a loader may write each batch over the one before.
    batches = [_tensors(item, index) for index, item in enumerate(_with_an_end(given))]
    if not batches:
        raise ValueError("The safety batches are empty. Give at least one batch with a response.")
    if all(item["labels"].dim() == 1 for item in batches):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected a whole number >= 1.")
        starts = range(0, len(batches), batch_size)
        batches = [_pad_together(batches[start : start + batch_size]) for start in starts]
    for index, batch in enumerate(batches):
        check_batch(f"Safety batch {index}", batch, positions)
    return batches


def add_contents(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Add the names, shapes, dtypes and contents of tensors on the CPU to a digest."""
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        # By address, because neither numpy nor a uint8 view is there for every dtype and setup.
        tensor = value.contiguous()
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def _with_an_end(items: Iterable[Any]) -> Iterator[Any]:
    if isinstance(items, Sized):
        yield from items
        return
    reading = iter(items)
    yield from islice(reading, _MOST_READ)
    if next(reading, None) is not None:
        raise ValueError(
            f"The safety batches do not say how many they are, and {_MOST_READ:,} were read without an end. "
            "Give a list or Dataset, for example list(islice(rows, 1000))."
        )


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
            batch[name] = torch.as_tensor(value).detach().to("cpu", copy=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"Safety batch {index}: '{name}' is a {type(value).__name__} that makes no tensor "
                f"({error}). Remove it, or collate to tensors first."
            ) from error
    return batch


def _pad_together(rows: list[Batch]) -> Batch:
    for row in rows:
        for name in row.keys() - {"labels"}:
            # What has more dimensions, as images have, is no column of tokens.
            if row[name].dim() < 2 and row[name].shape != row["input_ids"].shape:
                raise ValueError(
                    f"'{name}' of a safety row has shape {tuple(row[name].shape)}, and its input_ids "
                    f"{tuple(row['input_ids'].shape)}. Give an entry for each token, or remove the column."
                )
    rows = [with_mask(row) for row in rows]
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"Safety rows have different fields: {[sorted(row) for row in rows]}.")
    batch = {}
    for name in rows[0]:
        padding = IGNORE_INDEX if name == "labels" else 0
        batch[name] = torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], True, padding)
    return batch
