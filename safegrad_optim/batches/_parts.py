"""What goes through the model together: the rows of a rank, of one batch or of several."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from safegrad_optim.batches._positions import IGNORE_INDEX, Batch, with_mask

if TYPE_CHECKING:
    from safegrad_optim.batches._source import SourceBatches

# Beside a long row, short ones would be computed at its length: another pass is cheaper then.
_MOST_PADDING = 1.5


class Section(NamedTuple):
    """What a part has of one safety batch."""

    source: "SourceBatches"
    batch: int  # its index
    tokens: slice  # the compared tokens, among all those that this rank computes of the batch
    weight: float  # 1, or 0 where another rank's rows are run to keep pace

    @property
    def length(self) -> int:
        """Number of compared tokens."""
        return int(self.tokens.stop - self.tokens.start)


class Part(NamedTuple):
    """Rows that go through the model together; on the CPU, where nothing has to be waited for."""

    inputs: Batch  # without labels
    mask: Tensor  # the compared positions, (rows, length) bool
    labels: Tensor
    sections: tuple[Section, ...]  # whose compared tokens come one after another


def joined(parts: Sequence[Part]) -> list[Part]:
    """Put the rows of parts into few, padded on the right, or leave them where a field forbids it.

    Which ones depends on whole batches, so that it is the same on all ranks.
    """
    groups: list[list[Part]] = []
    size = tokens = 0  # of the last group: what is computed, padding included, and what it would be by itself
    for part in sorted(parts, key=_shape, reverse=True):
        width, rows = _shape(part)
        if groups and _can_join(groups[-1][0], part):
            widest, _ = _shape(groups[-1][0])
            if size + widest * rows <= _MOST_PADDING * (tokens + width * rows):
                groups[-1].append(part)
                size, tokens = size + widest * rows, tokens + width * rows
                continue
        groups.append([part])
        size = tokens = width * rows
    return [_joined(group) for group in groups]


def _shape(part: Part) -> tuple[int, int]:
    """Length and number of rows of the batch that a part is of."""
    (section,) = part.sections
    rows, width = section.source.batches[section.batch]["labels"].shape
    return width, rows


def _can_join(part: Part, other: Part) -> bool:
    """Whether all fields of both have one entry for each token, and have the same names."""
    names = [with_mask(fields.inputs).keys() for fields in (part, other)]
    return names[0] == names[1] and all(
        value.shape == each.labels.shape for each in (part, other) for value in each.inputs.values()
    )


def _joined(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    width = max(part.labels.shape[1] for part in parts)

    def rows(tensors: Iterable[Tensor], padding: int) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(tensor, (0, width - tensor.shape[1]), value=padding) for tensor in tensors])

    inputs = [with_mask(part.inputs) for part in parts]
    return Part(
        {name: rows((fields[name] for fields in inputs), 0) for name in inputs[0]},
        rows((part.mask for part in parts), 0),
        rows((part.labels for part in parts), IGNORE_INDEX),
        tuple(section for part in parts for section in part.sections),
    )
