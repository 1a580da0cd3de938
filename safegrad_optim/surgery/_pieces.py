"""Gradients as 1-D pieces of bounded size in fp32 or better, so that surgery runs at the speed of memory.

Small tensors, as those of adapters, are gathered and share kernels; large ones are taken where they are in
fp32, and as copies of a piece at a time in half precision.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim._torch_private import copy_all_, flattened, unflattened

# Gradients of one parameter, and the weight of their products.
Weighted = tuple[tuple[Tensor, ...], float]


class _Sizes(NamedTuple):
    piece: int  # most elements of a piece: two in fp32 stay in the cache from one reading to the next
    alone: int  # elements from which on a tensor is worth kernels of its own
    kept: int  # most elements that stay gathered from the sums to what is made of them


_CPU = _Sizes(piece=1 << 20, alone=1 << 13, kept=1 << 20)
_DEVICE = _Sizes(piece=1 << 22, alone=1 << 20, kept=3 << 21)


class Piece(NamedTuple):
    """The same elements of each of the gradients that were given together, and their weight."""

    values: tuple[Tensor, ...]  # 1-D, in fp32 or better: views, or copies that may be gone with the next one
    weight: float
    targets: list[Tensor]  # what the first values were copied from; empty where they are views

    def write_first(self) -> None:
        """Give the values of the first gradient back to it, rounded to its dtype."""
        if self.targets:
            final = self.values[0]
            if len(self.targets) > 1:
                # Rounded together, since torch copies a list in few kernels only where dtypes are the same.
                final = final.to(self.targets[0].dtype)
            copy_all_(self.targets, unflattened(final, self.targets))


@dataclass
class _Group:
    """Parts that are gathered in one piece."""

    weight: float
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)
    elements: int = 0


class Pieces:
    """Pieces that together hold every element of the gradients once, to be gone through several times.

    The dense gradients of each parameter are of equal shape, dtype and device.
    """

    def __init__(self, gradients: Iterable[Weighted]) -> None:
        self._views: list[Piece] = []
        self._groups: list[_Group] = []
        filling: dict[tuple[torch.device, torch.dtype, float], _Group] = {}
        for tensors, weight in gradients:
            sizes = _sizes(tensors[0].device)
            for part in _parts(tensors, sizes.piece):
                first = part[0]
                dtype, elements = first.dtype, first.numel()
                if elements >= sizes.alone and dtype == widened_dtype(dtype) and _are_contiguous(part):
                    self._views.append(Piece(tuple(tensor.view(-1) for tensor in part), weight, []))
                    continue
                kind = first.device, dtype, weight
                group = filling.get(kind)
                if group is None or group.elements + elements > sizes.piece:
                    group = filling[kind] = _Group(weight)
                    self._groups.append(group)
                group.parts.append(part)
                group.elements += elements
        self._gathered = sum(group.elements for group in self._groups)
        self._is_kept = all(self._gathered <= _sizes(device).kept for device, _, _ in filling)
        self._kept: list[Piece] = []
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __iter__(self) -> Iterator[Piece]:
        yield from self._views
        if len(self._kept) == len(self._groups):
            yield from self._kept
            return
        self._kept.clear()
        for group in self._groups:
            piece = self._piece(group)
            if self._is_kept:
                self._kept.append(piece)
            yield piece

    def _piece(self, group: _Group) -> Piece:
        """Copy the parts of a group one after the other, each of the gradients apart."""
        lists = [list(tensors) for tensors in zip(*group.parts, strict=True)]
        values = self._memory(len(lists), group).unbind()
        for value, tensors in zip(values, lists, strict=True):
            value.copy_(flattened(tensors))
        return Piece(values, group.weight, lists[0])

    def _memory(self, count: int, group: _Group) -> Tensor:
        """Room for so many gradients; fresh memory for each piece would cost more than its sums."""
        first = group.parts[0][0]
        device, dtype = first.device, widened_dtype(first.dtype)
        if self._is_kept:
            return torch.empty(count, group.elements, dtype=dtype, device=device)
        if (device, dtype) not in self._scratch:
            size = min(self._gathered, _sizes(device).piece)
            self._scratch[device, dtype] = torch.empty(count, size, dtype=dtype, device=device)
        return self._scratch[device, dtype][:, : group.elements]


@cache
def widened_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype that sums over gradients of this dtype are accumulated in."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _sizes(device: torch.device) -> _Sizes:
    return _CPU if device.type == "cpu" else _DEVICE


def _are_contiguous(tensors: tuple[Tensor, ...]) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _parts(tensors: tuple[Tensor, ...], limit: int) -> Iterable[tuple[Tensor, ...]]:
    """Views of the same elements of each tensor, no larger than a piece; small tensors as they are."""
    if tensors[0].is_complex():
        tensors = tuple(torch.view_as_real(tensor.resolve_conj()) for tensor in tensors)
    first = tensors[0]
    elements = first.numel()
    if elements == 0:
        # torch 2.8 does not give a piece of no elements its shape back.
        return ()
    if elements <= limit:
        return (tensors,)
    if _are_contiguous(tensors):
        # Equal parts: a small rest would cost a kernel as much as a piece does.
        count = math.ceil(elements / limit)
        return zip(*(tensor.view(-1).chunk(count) for tensor in tensors), strict=True)
    longest = max(range(first.dim()), key=lambda dim: first.shape[dim])
    halves = zip(*(tensor.chunk(2, longest) for tensor in tensors), strict=True)
    return [part for half in halves for part in _parts(half, limit)]
