"""The sums over all elements of two gradients that decide a step, accumulated in fp32 or better."""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.parallel import sum_over_ranks
from safegrad_optim.surgery._pairs import Gradients, Pairs, take_apart
from safegrad_optim.surgery._pieces import Pieces, Weighted

# A CPU sums up one element after another: in fp32 no more than these, and such sums are added in fp64.
_SUMMED = 1 << 18


class GradientProducts(NamedTuple):
    """The four sums that decide a step; each a 0-dim fp64 tensor (fp32 where fp64 is missing)."""

    inner_product: Tensor  #: <g_user, g_align> over all parameters that have both gradients
    user_sq_norm: Tensor  #: ||g_user||^2
    alignment_sq_norm: Tensor  #: ||g_align||^2 over all parameters
    shared_alignment_sq_norm: Tensor  #: ||g_align||^2 over those that also have a user gradient
    eps: float  #: relative precision of the accumulation

    @property
    def negligible(self) -> Tensor:
        """Whether g_align is zero or noise, ||g_align|| <= eps ||g_user||: a 0-dim bool tensor."""
        # Relative to the user gradient, so that the decision does not depend on the scale of either loss.
        # Not-greater instead of smaller: with two zero gradients the alignment gradient is negligible too.
        return ~(self.alignment_sq_norm > self.eps**2 * self.user_sq_norm)


@torch.no_grad()
def inner_products(user_grads: Gradients, alignment_grads: Gradients) -> GradientProducts:
    """Compute the inner product and squared norms of two gradients.

    <u, a> = sum_i sum(u_i * a_i), likewise <u, u> and <a, a>, one sum over all tensors together.

    With DTensors among them all ranks have to call this, and it takes one all-reduce. Arguments and errors
    are those of `combine_`; the sums are on the device of the first gradient.
    """
    return sums_of(take_apart(user_grads, alignment_grads))


@torch.no_grad()
def sums_of(gradients: Pairs) -> GradientProducts:
    """Compute the `inner_products` of two gradients that are taken apart already."""
    user_only: list[Weighted] = []
    alignment_only: list[Weighted] = []
    for index, (user, alignment, weight) in enumerate(gradients.pairs):
        if user is not None and alignment is not None:
            if user.layout != alignment.layout:
                found = f"user-task layout {user.layout} != alignment layout {alignment.layout}"
                raise ValueError(f"Gradient {index}: {found}. Build both with the same model.")
        elif user is not None:
            user_only.append((_on_union(user), weight))
        elif alignment is not None:
            alignment_only.append((_on_union(alignment), weight))
    sums: tuple[list[Tensor], ...] = ([], [], [], [])
    cross, user_sq, shared_sq, other_sq = sums
    apart = Pieces((_on_union(user, alignment), weight) for user, alignment, weight in gradients.apart)
    for (u, a), weight in _counted(gradients.both, apart):
        cross.append(_dot(u, a, weight))
        user_sq.append(_dot(u, u, weight))
        shared_sq.append(_dot(a, a, weight))
    for squares, one_sided in ((user_sq, user_only), (other_sq, alignment_only)):
        for (value,), weight in _counted(Pieces(one_sided)):
            squares.append(_dot(value, value, weight))
    totals = torch.stack([_total(values, gradients.device) for values in sums])
    inner, user_total, shared, other = (sum_over_ranks(totals) if gradients.is_sharded else totals).unbind()
    return GradientProducts(inner, user_total, shared + other, shared, gradients.eps)


def _counted(*gradients: Pieces) -> Iterator[Weighted]:
    """The values of pieces that enter the sums, no more at a time than can be summed up exactly enough."""
    for values, weight, _ in chain(*gradients):
        if not weight:
            continue
        if values[0].device.type != "cpu" or values[0].numel() <= _SUMMED:
            yield values, weight
        else:
            yield from (
                (part, weight) for part in zip(*(value.split(_SUMMED) for value in values), strict=True)
            )


def _on_union(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Sparse COO gradients as values on the union of their indices, zero where missing."""
    if not gradients[0].is_sparse:
        return gradients
    union = sum((gradient.detach() * 0 for gradient in gradients[1:]), gradients[0].detach() * 0)
    return tuple((gradient + union).coalesce().values() for gradient in gradients)


def _dot(left: Tensor, right: Tensor, weight: float) -> Tensor:
    product = torch.dot(left, right)
    return product if weight == 1.0 else product.double() * weight


def _total(sums: list[Tensor], device: torch.device) -> Tensor:
    """Sum of 0-dim tensors from whatever devices, in fp64 where the device has it."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    if not sums:
        return torch.zeros((), dtype=wide, device=device)
    return torch.stack([value.to(device) for value in sums]).to(wide).sum()
