"""What goes through the model together: the rows of a rank, of one batch or of several."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from safegrad_optim.batches._batches import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from safegrad_optim.batches._source import SourceBatches


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
    """Rows that go through the model together, on its device."""

    inputs: Batch  # without labels
    mask: Tensor  # the compared positions, (rows, length) bool
    labels: Tensor
    sections: tuple[Section, ...]  # whose compared tokens come one after another


def joined(parts: Sequence[Part]) -> Sequence[Part]:
    """Put the rows of parts into one, padded on the right, or leave them where a field forbids it."""
    if len(parts) == 1:
        return parts
    inputs = [{"attention_mask": torch.ones_like(part.labels), **part.inputs} for part in parts]
    shapes = [part.labels.shape for part in parts]
    if any(
        fields.keys() != inputs[0].keys() or any(value.shape != shape for value in fields.values())
        for fields, shape in zip(inputs, shapes, strict=True)
    ):
        return parts
    width = max(shape[1] for shape in shapes)

    def rows(tensors: Iterable[Tensor], padding: int) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(tensor, (0, width - tensor.shape[1]), value=padding) for tensor in tensors])

    return [
        Part(
            {name: rows((fields[name] for fields in inputs), 0) for name in inputs[0]},
            rows((part.mask for part in parts), 0),
            rows((part.labels for part in parts), IGNORE_INDEX),
            tuple(section for part in parts for section in part.sections),
        )
    ]
