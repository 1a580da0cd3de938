"""What rounding to half precision leaves of a conflict, measured."""

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from safegrad_optim.surgery._blocks import Weighted, blocks
from safegrad_optim.surgery._products import dense, dot, total

# Measured on about as many elements, in runs: the sample costs next to nothing beside long lists.
_SAMPLE = 1 << 18
_RUN = 1 << 9


def left_by_rounding(pairs: Sequence[tuple[Tensor, Tensor]], coefficient: Tensor) -> Tensor:
    """<round(u + c a) - (u + c a), a> over pairs (u, a), before any of them is changed.

    Of many elements it is estimated on a sample, to some 1e-5 of ||u + c a|| ||a||.
    """
    values = [dense(*pair) for pair in pairs]
    # Odd, so that with rows of any power of two the runs are not of the same columns.
    every = sum(user.numel() for user, _ in values) // _SAMPLE | 1
    scale = cache(coefficient.to)
    products: list[Tensor] = []
    for block in blocks([_sample(pair, every) for pair in values]):
        u, a = block.values
        u.addcmul_(a, scale(u.device, u.dtype))
        rounded = u.to(block.parts[0][0].dtype)
        products.append(dot(rounded.to(u.dtype).sub_(u), a, block.weight))
    return total(products, coefficient.device)


def _sample(pair: tuple[Tensor, ...], every: int) -> Weighted:
    """One of `every` runs of elements of each gradient, and how many times as many elements they have."""
    elements = pair[0].numel()
    run = min(_RUN, elements)
    if every == 1 or run == 0 or not all(gradient.is_contiguous() for gradient in pair):
        return pair, 1.0
    stride = every * _RUN
    count = 1 + (elements - run) // stride
    runs = tuple(gradient.as_strided((count, run), (stride, 1)) for gradient in pair)
    return runs, elements / (count * run)
