"""Gradients as 1-D blocks of bounded size in fp32 or better, so that surgery runs at the speed of memory.

Large ones are cut, never to be there in fp32 as a whole; small ones share kernels, as those of adapters.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim._torch_private import copy_all_, unflattened

# Gradients of one parameter, and the weight of their products.
Weighted = tuple[tuple[Tensor, ...], float]


class _Sizes(NamedTuple):
    block: int  # most elements to a block: on a CPU, two of them stay in cache between their readings
    alone: int  # elements from which on a tensor is not copied to be put together with others


_CPU = _Sizes(block=1 << 18, alone=1 << 13)
_DEVICE = _Sizes(block=1 << 24, alone=1 << 21)
# Elements below which copying costs more than it saves.
_WORTH_COPYING = 1 << 16


class Block(NamedTuple):
    """The same elements of each of the gradients that were given together, and their weight."""

    values: tuple[Tensor, ...]  # 1-D, in fp32 or better: views, or copies that last until the next block
    weight: float
    parts: Sequence[tuple[Tensor, ...]]  # what `values` were copied from; empty where they are views

    def write_first(self) -> None:
        """Give the values of the first gradient back to it, rounded to its dtype."""
        if self.parts:
            targets = [part[0] for part in self.parts]
            copy_all_(targets, unflattened(self.values[0], targets))


def blocks(gradients: Sequence[Weighted]) -> Iterator[Block]:
    """Yield blocks that together hold every element of the gradients once; those of a block have one weight.

    The dense gradients of each parameter are of equal shape, dtype and device.
    """
    scratch = _Scratch(sum(tensors[0].numel() * (1 + tensors[0].is_complex()) for tensors, _ in gradients))
    waiting: dict[tuple[torch.device, torch.dtype, float], list[tuple[Tensor, ...]]] = defaultdict(list)
    filled: Counter[tuple[torch.device, torch.dtype, float]] = Counter()
    for part, weight in ((part, weight) for tensors, weight in gradients for part in _parts(tensors)):
        first = part[0]
        sizes = _sizes(first.device)
        is_wide = first.dtype == widened_dtype(first.dtype)
        if is_wide and first.numel() >= sizes.alone and all(tensor.is_contiguous() for tensor in part):
            yield Block(tuple(tensor.view(-1) for tensor in part), weight, ())
        elif 2 * first.numel() > sizes.block:
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


def in_cache(gradients: Sequence[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield gradients on a CPU, long ones of bf16 in parts that are in its cache.

    A kernel that rounds to bf16 has few reads under way and waits for memory; a copy first does not.
    """
    memory: Tensor | None = None
    for tensors in gradients:
        if tensors[0].dtype != torch.bfloat16 or tensors[0].numel() < _WORTH_COPYING:
            yield tensors
            continue
        for part in _parts(tensors):
            if memory is None:
                memory = torch.empty(_CPU.block, dtype=torch.bfloat16)
            for tensor in part:
                memory[: tensor.numel()].view(tensor.shape).copy_(tensor)
            yield part


@cache
def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype that sums over gradients of this dtype are accumulated in."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _sizes(device: torch.device) -> _Sizes:
    return _CPU if device.type == "cpu" else _DEVICE


def _parts(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same elements of each tensor, no larger than a block; small tensors as they are."""
    if tensors[0].is_complex():
        tensors = tuple(torch.view_as_real(tensor.resolve_conj()) for tensor in tensors)
    first = tensors[0]
    limit = _sizes(first.device).block
    if first.numel() == 0:
        # torch 2.8 does not give a piece of no elements its shape back.
        return
    if first.numel() <= limit:
        yield tensors
    elif all(tensor.is_contiguous() for tensor in tensors):
        # Equal parts: a small rest would cost a kernel as much as a block does.
        count = math.ceil(first.numel() / limit)
        yield from zip(*(tensor.view(-1).chunk(count) for tensor in tensors), strict=True)
    else:
        longest = max(range(first.dim()), key=lambda dim: first.shape[dim])
        for half in zip(*(tensor.chunk(2, longest) for tensor in tensors), strict=True):
            yield from _parts(half)


class _Scratch:
    """Memory that all blocks of one pass share: fresh memory for each would cost more than the sums."""

    def __init__(self, elements: int) -> None:
        self.elements = elements  # most that a block may have to hold
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def gather(self, parts: Sequence[tuple[Tensor, ...]], weight: float) -> Block:
        """Copy parts one after the other, each of the gradients apart."""
        first = parts[0][0]
        size = sum(part[0].numel() for part in parts)
        key = size, first.device, widened_dtype(first.dtype)
        # Most parts are of few sizes, and views of small parts cost as much as their copies.
        values = self._rows.get(key) or self._new_rows(len(parts[0]), *key)
        for value, tensors in zip(values, zip(*parts, strict=True), strict=True):
            if len(tensors) == 1:
                value.view(tensors[0].shape).copy_(tensors[0])
            else:
                copy_all_(unflattened(value, tensors), tensors)
        return Block(values, weight, parts)

    def _new_rows(
        self, count: int, size: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        if (device, dtype) not in self._memory:
            shape = count, min(self.elements, _sizes(device).block)
            self._memory[device, dtype] = torch.empty(shape, dtype=dtype, device=device)
        rows = self._memory[device, dtype][:, :size].unbind()
        self._rows[size, device, dtype] = rows
        return rows
