"""A source of safety rows, their order, and the parts of a rank."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from safegrad_optim.batches._batches import SafetyBatches, add_contents, as_batches
from safegrad_optim.batches._parts import Part, Section
from safegrad_optim.batches._positions import IGNORE_INDEX, Batch, Positions, position_mask
from safegrad_optim.parallel import Share

# What else than other texts makes the rows of a resumed run others.
DATED = "some chat templates write the day's date, see chat_template_kwargs of safety_rows"


@dataclass(frozen=True, kw_only=True, eq=False)
class SafetySource:
    """Safety rows whose loss is a mean of its own in the alignment loss.

    L_align = sum over sources of weight x mean over the compared tokens of its next batch

    Args:
        rows: model inputs with `labels`, as in `KLAlignment`.
        weight: of its mean.
        batch_size: rows to a step, where `rows` are single rows.
        tokens: compare only the first so many tokens of each response, and cut what comes behind; `None`
            compares all. The first few decide whether a reply refuses.
        positions: "response" compares response tokens only, "all" every token.

    Raises:
        ValueError: `weight` is not positive and finite, or `tokens` is not positive.
    """

    rows: SafetyBatches
    weight: float = 1.0
    batch_size: int = 8
    tokens: int | None = None
    positions: Positions = "response"

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}, expected a positive finite number.")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}, expected a whole number >= 1, or None for all.")


class SourceBatches:
    """The checked batches of a source, and which of them is next."""

    def __init__(self, source: SafetySource, seed: int) -> None:
        batches = as_batches(source.rows, positions=source.positions, batch_size=source.batch_size)
        self.batches = batches if source.tokens is None else [_opening(b, source.tokens) for b in batches]
        self.positions = source.positions
        self.weight = source.weight
        self.seed = seed
        self.taken = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the contents of the batches and of which positions are compared."""
        contents = hashlib.sha256(self.positions.encode())
        for batch in self.batches:
            add_contents(contents, batch)
        return contents.hexdigest()

    def next_index(self) -> int:
        """Return the index of the next batch: each epoch is a new permutation, set by the seed alone."""
        epoch, position = divmod(self.taken, len(self.batches))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return int(torch.randperm(len(self.batches), generator=generator)[position])

    def state_dict(self) -> dict[str, int]:
        """Return the place in the order of batches."""
        # A number, because torch.distributed.checkpoint takes no other state of an optimizer.
        rows = int(self.digest[:15], 16)
        return {"count": len(self.batches), "seed": self.seed, "taken": self.taken, "rows": rows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was saved, with as many batches and the same seed."""
        own = self.state_dict()
        # States of before have no digest of the rows.
        for key in ("count", "seed", *(["rows"] if "rows" in state else [])):
            if state[key] != own[key]:
                found = f"The saved order of safety batches has {key} {state[key]}, this one {own[key]}"
                hint = f" ({DATED})" if key == "rows" else ""
                raise ValueError(
                    f"{found}. Build it from the safety batches and seed of the saved run{hint}."
                )
        self.taken = state["taken"]

    def tokens(self, index: int) -> int:
        """Return the number of compared tokens of a batch, on all ranks together."""
        return int(position_mask(self.batches[index], self.positions).sum())

    def parts(self, index: int, share: Share, size: int | None) -> Iterator[Part]:
        """Yield a rank's share of a batch, `size` rows at a time, and as many parts on every rank."""
        batch = self.batches[index]
        mask = position_mask(batch, self.positions)
        own, first = _row_groups(mask, share, size), _row_groups(mask, Share(0, share.size), size)
        # Rank 0 has most rows; others run a row once more, for nothing but the collectives in the passes.
        spare = own[0] if own else torch.tensor([0])
        done = 0
        for number, rows in enumerate(own + [spare] * (len(first) - len(own))):
            counts = number < len(own)
            chosen = batch if len(rows) == len(mask) else _select(batch, rows)
            inputs = {name: value for name, value in chosen.items() if name != "labels"}
            start = done if counts else 0
            done = start + int(mask[rows].sum())
            section = Section(self, index, slice(start, done), float(counts))
            yield Part(inputs, mask[rows], chosen["labels"], (section,))


def _opening(batch: Batch, tokens: int) -> Batch:
    """A batch with the first labelled tokens of each row alone, and without columns that no row needs."""
    labelled = batch["labels"] != IGNORE_INDEX
    kept = labelled & (labelled.cumsum(dim=1) <= tokens)
    width = int(kept.any(dim=0).nonzero().max()) + 1
    opening = batch | {"labels": batch["labels"].where(kept, IGNORE_INDEX)}
    shape = batch["labels"].shape
    return {name: value[:, :width] if value.shape == shape else value for name, value in opening.items()}


def _row_groups(mask: Tensor, share: Share, size: int | None) -> list[Tensor]:
    """Rows of one share in groups of `size`."""
    rows = torch.arange(len(mask))[share.rank :: share.size]
    return list(rows.split(size or len(mask))) if len(rows) else []


def _select(batch: Batch, rows: Tensor) -> Batch:
    count = len(batch["labels"])
    for name, value in batch.items():
        if value.shape[:1] != (count,):
            raise ValueError(
                f"'{name}' of a safety batch has shape {tuple(value.shape)}, not one entry for each of the "
                f"{count} rows, which are split over ranks or micro-batches. Leave it out or expand it."
            )
    return {name: value[rows] for name, value in batch.items()}
