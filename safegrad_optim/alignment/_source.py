"""A source of safety rows: its batches, what is compared in them, their order, and the parts of a rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from safegrad_optim.batches import Batch, BatchOrder, Part, Positions, position_mask
from safegrad_optim.parallel import Share


class SafetySource:
    """Safety batches whose loss is a mean of its own, which counts `weight` times in the alignment loss.

    L_align = sum over sources of weight x mean over the compared tokens of its next batch
    """

    def __init__(self, batches: list[Batch], *, positions: Positions, seed: int, weight: float = 1.0) -> None:
        self.batches = batches
        self.positions = positions
        self.weight = weight
        self.order = BatchOrder(len(batches), seed)

    def tokens(self, index: int) -> int:
        """Return the number of compared tokens of a batch, on all ranks together."""
        return int(position_mask(self.batches[index], self.positions).sum())

    def parts(self, index: int, share: Share, device: torch.device, size: int | None) -> Iterator[Part]:
        """Yield a rank's share of a batch, `size` rows at a time, and as many parts on every rank."""
        batch = self.batches[index]
        mask = position_mask(batch, self.positions)
        shares = [_row_groups(mask, Share(rank, share.size), size) for rank in range(share.size)]
        own = shares[share.rank]
        # Where others have more rows, some row once more, for nothing but the collectives in the passes.
        spare = own[0] if own else mask.any(dim=1).nonzero()[:1, 0]
        done = 0
        for number, rows in enumerate(own + [spare] * (max(map(len, shares)) - len(own))):
            counts = number < len(own)
            chosen = batch if len(rows) == len(mask) else _select(batch, rows)
            tensors = {name: value.to(device) for name, value in chosen.items()}
            labels = tensors.pop("labels")
            start = done if counts else 0
            done = start + int(mask[rows].sum())
            yield Part(tensors, mask[rows].to(device), labels, float(counts), index, slice(start, done))


def _row_groups(mask: Tensor, share: Share, size: int | None) -> list[Tensor]:
    """Rows of one share in groups of `size`, without groups that have nothing to compare."""
    groups = torch.arange(len(mask))[share.rank :: share.size].split(size or len(mask))
    return [group for group in groups if mask[group].any()]


def _select(batch: Batch, rows: Tensor) -> Batch:
    count = len(batch["labels"])
    for name, value in batch.items():
        if value.shape[:1] != (count,):
            raise ValueError(
                f"'{name}' of a safety batch has shape {tuple(value.shape)}, not one entry for each of the "
                f"{count} rows, which are split over ranks or micro-batches. Leave it out or expand it."
            )
    return {name: value[rows] for name, value in batch.items()}
