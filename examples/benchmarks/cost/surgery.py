"""The surgery alone on lists of gradients: against the floor, other ways to write it, and sizes.

The floor is what memory allows: both gradients are read for the inner products, both are read again
and one is written, 5 moves of n elements; it is taken from the time of a plain copy, which makes 2.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from common.meter import Meter
from safegrad_optim import combine_

Shapes = list[tuple[int, ...]]
Way = Callable[[list[Tensor], list[Tensor]], object]

# The floor is that of memory: what is copied has to exceed the caches.
_COPY_BYTES = 1 << 28


class Timing(NamedTuple):
    """Seconds of one way to do the surgery, median and spread of repetitions."""

    median: float
    low: float
    high: float


def llama_lora_shapes() -> Shapes:
    """Adapters of Llama-3-8B, r = 8 on q, k and v: 192 tensors."""
    per_layer: Shapes = [(8, 4096), (4096, 8), (8, 4096), (1024, 8), (8, 4096), (1024, 8)]
    return per_layer * 32


def smollm2_shapes() -> Shapes:
    """All parameters of SmolLM2-135M: 272 tensors, 134.5 million elements."""
    layer = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    return [(49152, 576), *((*layer, (576,), (576,)) * 30), (576,)]


def of_size(elements: int, tensors: int) -> Shapes:
    """`elements` in `tensors` equal tensors."""
    return [(elements // tensors,)] * tensors


def safegrad(user: list[Tensor], alignment: list[Tensor]) -> object:
    """What the optimizer runs."""
    return combine_(user, alignment, 1.0)


def loop(user: list[Tensor], alignment: list[Tensor]) -> object:
    """The least that does the job tensor by tensor, without statistics; fp32 only."""
    inner = torch.stack([torch.dot(u.view(-1), a.view(-1)) for u, a in _pairs(user, alignment)]).sum()
    square = torch.stack([torch.dot(a.view(-1), a.view(-1)) for a in alignment]).sum()
    coefficient = 1.0 + (-inner).clamp(min=0) / square
    for u, a in _pairs(user, alignment):
        u.addcmul_(a, coefficient)
    return coefficient


def upcast(user: list[Tensor], alignment: list[Tensor]) -> object:
    """Each tensor made fp32 before it is used."""
    inner = torch.stack([(u.float() * a.float()).sum() for u, a in _pairs(user, alignment)]).sum()
    square = torch.stack([a.float().square().sum() for a in alignment]).sum()
    coefficient = 1.0 + (-inner).clamp(min=0) / square
    for u, a in _pairs(user, alignment):
        u.copy_(u.float() + coefficient * a.float())
    return coefficient


def flatten(user: list[Tensor], alignment: list[Tensor]) -> object:
    """Concatenate all gradients, operate, scatter: how public ports of the paper do it."""
    flat_user = torch.cat([u.reshape(-1) for u in user])
    flat_alignment = torch.cat([a.reshape(-1) for a in alignment])
    inner = (flat_user * flat_alignment).sum()
    if inner < 0:
        square = (flat_alignment * flat_alignment).sum()
        flat_user = flat_user - (inner / square) * flat_alignment
    final = flat_user + 1.0 * flat_alignment
    offset = 0
    for u in user:
        u.copy_(final[offset : offset + u.numel()].view_as(u))
        offset += u.numel()
    return final


WAYS: dict[str, Way] = {"safegrad": safegrad, "loop": loop, "upcast": upcast, "flatten": flatten}


def gradients(shapes: Shapes, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """A user and an alignment gradient of these shapes; `conflicting` gives the first its values."""
    generator = torch.Generator(device).manual_seed(0)
    alignment = [
        torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for shape in shapes
    ]
    return [torch.empty_like(a) for a in alignment], alignment


def conflicting(user: list[Tensor], alignment: list[Tensor]) -> None:
    """Make the gradients conflict, so that every way has all of its work to do."""
    torch._foreach_copy_(user, alignment)
    torch._foreach_mul_(user, -0.5)


def compare(
    names: list[str], shapes: Shapes, dtype: torch.dtype, device: str, repetitions: int
) -> dict[str, Timing]:
    """Time the ways in turns, and the floor among them as "floor"."""
    user, alignment = gradients(shapes, dtype, device)
    source, target = (torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    floor_scale = 2.5 * sum(u.nbytes for u in user) / _COPY_BYTES
    spent: dict[str, list[float]] = {name: [] for name in [*names, "floor"]}
    for repetition in range(repetitions + 1):
        for name, values in spent.items():
            if name == "floor":
                value = floor_scale * seconds(lambda: target.copy_(source), device)
            else:
                conflicting(user, alignment)
                value = seconds(partial(WAYS[name], user, alignment), device)
            if repetition > 0:  # the first warms up
                values.append(value)
    return {name: Timing(statistics.median(v), min(v), max(v)) for name, v in spent.items()}


def extra_memory(name: str, shapes: Shapes, dtype: torch.dtype, device: str) -> int:
    """Bytes that a way needs at its peak beyond the two gradients; call it in a fresh process."""
    user, alignment = gradients(shapes, dtype, device)
    conflicting(user, alignment)
    held = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    meter = Meter(device)
    with meter:
        WAYS[name](user, alignment)
    return meter.peak_bytes - held


def seconds(work: Callable[[], object], device: str) -> float:
    """Time one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _pairs(user: list[Tensor], alignment: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(user, alignment, strict=True)
