"""Gradients as 1-D blocks of bounded size in fp32 or better, so that surgery runs at the speed of memory.

Large tensors are cut, so that a half-precision gradient is never there in fp32 as a whole, and small ones
are put together, so that hundreds of adapters cost a few kernels and not thousands.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Weighted", "blocks", "widened_dtype"]

# Gradients of one parameter, and the weight of their products.
Weighted = tuple[tuple[Tensor, ...], float]


class _Sizes(NamedTuple):
    block: int
    """Most elements to a block: on a CPU, two of them stay in cache between their readings."""
    alone: int
    """Elements from which on a tensor is not put together with others, for which it would be copied."""


_CPU = _Sizes(block=1 << 19, alone=1 << 13)
_DEVICE = _Sizes(block=1 << 24, alone=1 << 21)


class Block(NamedTuple):
    """The same elements of each of the gradients that were given together."""

    values: tuple[Tensor, ...]
    """Of each gradient, 1-D, in fp32 or better; a view of it or a copy that lasts until the next block."""
    weight: float
    """The weight given with the gradients."""
    narrow: tuple[Tensor, ...]
    """Memory for `values` in the dtype of the gradients; empty where `values` are views."""
    parts: Sequence[tuple[Tensor, ...]]
    """What `values` were copied from."""

    def write_first(self) -> None:
        """Give the values of the first gradient back to it, rounded to its dtype, and keep them so."""
        if not self.parts:
            return
        value, narrow = self.values[0], self.narrow[0]
        targets = [part[0] for part in self.parts]
        if len(targets) == 1:
            (narrow,) = targets
            narrow.copy_(value.view(narrow.shape))
        else:
            if narrow is not value:
                narrow.copy_(value)
            pieces = narrow.split([target.numel() for target in targets])
            sources = [piece.view(target.shape) for piece, target in zip(pieces, targets, strict=True)]
            torch._foreach_copy_(targets, sources)
        if narrow.dtype != value.dtype:
            value.view(narrow.shape).copy_(narrow)


def blocks(gradients: Sequence[Weighted]) -> Iterator[Block]:
    """Yield blocks that together hold every element of the gradients once.

    Args:
        gradients: dense gradients of one parameter each, of equal shape, dtype and device, with a weight;
            only gradients of one weight share a block.
    """
    parts = [(part, weight) for tensors, weight in gradients for part in _parts(tensors)]
    scratch = _Scratch(sum(part[0].numel() for part, _ in parts))
    waiting: dict[tuple[torch.device, torch.dtype, float], list[tuple[Tensor, ...]]] = defaultdict(list)
    filled: Counter[tuple[torch.device, torch.dtype, float]] = Counter()
    for part, weight in parts:
        first = part[0]
        sizes = _sizes(first.device)
        is_copied = first.dtype != widened_dtype(first.dtype) or first.dim() != 1
        if not is_copied and first.numel() >= sizes.alone:
            yield Block(part, weight, (), ())
        elif is_copied and 8 * first.numel() >= sizes.block:
            yield scratch.gather([part], weight)
        else:
            key = first.device, first.dtype, weight
            if filled[key] + first.numel() > sizes.block:
                yield scratch.gather(waiting.pop(key), weight)
                filled[key] = 0
            waiting[key].append(part)
            filled[key] += first.numel()
    for (_, _, weight), together in waiting.items():
        yield scratch.gather(together, weight)


@cache
def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype that sums over gradients of this dtype are accumulated in."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _sizes(device: torch.device) -> _Sizes:
    return _CPU if device.type == "cpu" else _DEVICE


def _parts(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of each tensor, no larger than a block, 1-D where strides allow it."""
    if tensors[0].is_complex():
        tensors = tuple(torch.view_as_real(tensor.resolve_conj()) for tensor in tensors)
    first = tensors[0]
    limit = _sizes(first.device).block
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = tuple(tensor.view(-1) for tensor in tensors)
        yield from [flat] if len(flat[0]) <= limit else zip(*(t.split(limit) for t in flat), strict=True)
    elif first.numel() <= limit:
        yield tensors
    else:
        longest = max(range(first.dim()), key=lambda dim: first.shape[dim])
        for half in zip(*(tensor.chunk(2, longest) for tensor in tensors), strict=True):
            yield from _parts(half)


class _Scratch:
    """Memory that all blocks of one pass share: fresh memory for each would cost more than the sums.

    Args:
        elements: most that a block may have to hold.
    """

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def gather(self, parts: Sequence[tuple[Tensor, ...]], weight: float) -> Block:
        """Copy parts one after the other, each of the gradients apart."""
        first = parts[0][0]
        rows, size = len(parts[0]), sum(part[0].numel() for part in parts)
        values = self._rows(rows, size, first.device, widened_dtype(first.dtype))
        if len(parts) == 1:
            for value, tensor in zip(values, parts[0], strict=True):
                value.view(tensor.shape).copy_(tensor)
            return Block(values, weight, values, parts)
        narrow = values
        if first.dtype != values[0].dtype:
            narrow = self._rows(rows, size, first.device, first.dtype)
        for value, row, tensors in zip(values, narrow, zip(*parts, strict=True), strict=True):
            torch.cat([tensor.reshape(-1) for tensor in tensors], out=row)
            if row is not value:
                value.copy_(row)
        return Block(values, weight, narrow, parts)

    def _rows(self, count: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        key = device, dtype
        if key not in self._memory:
            shape = count, min(self.elements, _sizes(device).block)
            self._memory[key] = torch.empty(shape, dtype=dtype, device=device)
        return tuple(row[:size] for row in self._memory[key])
