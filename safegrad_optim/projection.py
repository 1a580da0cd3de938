"""Gradient surgery on lists of tensors: the math of SafeGrad and nothing else.

With u the user gradient, a the alignment gradient, each the concatenation of all entries of its list,
Eq. 4 and 5 of the paper are one formula with one scalar:

    g = u + c a,    c = rho + max(0, -<u, a>) / ||a||^2

Nothing here waits for a device to read a value back, so the functions may be used inside a training step
on any device. Sums are accumulated in fp32 or better and every gradient is rounded once.

Sharded gradients (DTensors) stay where they are: each rank sums over its own part, each element is counted
once, and one all-reduce of the sums gives every rank the same decision.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 3-5.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.blocks import Weighted, blocks, widened_dtype
from safegrad_optim.distributed import (
    copies,
    is_distributed_tensor,
    is_partial,
    local,
    placement,
    sum_over_ranks,
)

__all__ = [
    "GradientProducts",
    "SurgeryStats",
    "check_gradients",
    "combine",
    "combine_",
    "inner_products",
    "project_conflicting",
]

Gradients = Sequence[Tensor | None]

# What two gradients of a parameter have in common.
_TRAITS = ("shape", "dtype", "device", "placement")
# Rounding is measured on about as many elements, in runs: the sample costs next to nothing beside long lists.
_SAMPLE = 1 << 20
_RUN = 1 << 9


class GradientProducts(NamedTuple):
    """The four sums that decide a step; each a 0-dim fp64 tensor (fp32 where fp64 is missing)."""

    inner_product: Tensor
    """<g_user, g_align> over all parameters that have both gradients."""
    user_sq_norm: Tensor
    """||g_user||^2."""
    alignment_sq_norm: Tensor
    """||g_align||^2 over all parameters."""
    shared_alignment_sq_norm: Tensor
    """||g_align||^2 over the parameters that also have a user gradient."""
    eps: float
    """Relative precision of the accumulation; an alignment gradient below it is noise."""


class SurgeryStats(NamedTuple):
    """What one step of surgery saw and did; each a 0-dim tensor on the gradients' device.

    Reading a value (`float(stats.cosine)`, `stats.to_dict()`) is what waits for the device.
    """

    inner_product: Tensor
    """<g_user, g_align> before surgery."""
    cosine: Tensor
    """Cosine of the two gradients before surgery; 0 where either is zero."""
    user_norm: Tensor
    """||g_user|| before surgery."""
    alignment_norm: Tensor
    """||g_align||."""
    conflict: Tensor
    """Whether <g_user, g_align> < 0 (Eq. 3) and so g_user was projected."""
    negligible: Tensor
    """Whether g_align was zero or below the rounding of g_user, so that the step was a plain one."""
    residual_cosine: Tensor
    """Cosine with g_align of the user part of the final gradient: of a conflict, what rounding left.

    Rounding is measured for half-precision gradients: of long lists on a sample of about 2^20 elements,
    to some 1e-5. NaN where those are sharded, where it would take a second all-reduce. In fp32 and wider the
    rounding is below what the sums can tell.
    """
    final_norm: Tensor
    """||g'_user + rho g_align||, before rounding and clipping."""

    def to_dict(self) -> dict[str, float]:
        """Read all values to the host at once, as floats by field name."""
        values = torch.stack([value.double().cpu() for value in self])
        return dict(zip(self._fields, values.tolist(), strict=True))


def check_gradients(user_grads: Gradients, alignment_grads: Gradients) -> None:
    """Check that two gradient lists can be combined entry by entry.

    Args:
        user_grads: gradients of the user's loss, `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss in the same order.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or placements differ, or a dtype has no gradients.
        NotImplementedError: an entry is a DTensor whose sum over ranks is pending (`Partial`).
    """
    if len(user_grads) != len(alignment_grads):
        raise ValueError(
            f"{len(user_grads)} user-task gradients != {len(alignment_grads)} alignment gradients. "
            "Build both from the same optimizer.param_groups."
        )
    for index, (user, alignment) in enumerate(zip(user_grads, alignment_grads, strict=True)):
        for gradient in (user, alignment):
            if gradient is None:
                continue
            if is_partial(gradient):
                raise NotImplementedError(
                    f"Gradient {index} is placed as {placement(gradient)}: its sum over ranks is pending. "
                    "Redistribute it to the placements of its parameter."
                )
            if not (gradient.is_floating_point() or gradient.is_complex()):
                raise ValueError(
                    f"Gradient {index} has dtype {gradient.dtype}, expected a floating-point one."
                )
        if user is None or alignment is None:
            continue
        traits = zip(_TRAITS, _traits(user), _traits(alignment), strict=True)
        for what, found, other in traits:
            if found != other:
                raise ValueError(
                    f"Gradient {index}: user-task {what} {found} != alignment {what} {other}. "
                    "Build both from the same optimizer.param_groups."
                )


@torch.no_grad()
def inner_products(user_grads: Gradients, alignment_grads: Gradients) -> GradientProducts:
    """Compute the inner product and squared norms of two gradients.

    <u, a> = sum_i sum(u_i * a_i), likewise <u, u> and <a, a>, one sum over all tensors together.

    With DTensors among them all ranks have to call this, and it takes one all-reduce.

    Args:
        user_grads: gradients of the user's loss, `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss; same order, shapes, dtypes and devices.

    Returns:
        The sums as 0-dim tensors on the device of the first gradient.

    Raises:
        ValueError: the lists cannot be combined, see `check_gradients`.
    """
    check_gradients(user_grads, alignment_grads)
    sharded = _is_sharded(user_grads, alignment_grads)
    both: list[Weighted] = []
    user_only: list[Weighted] = []
    alignment_only: list[Weighted] = []
    cross: list[Tensor] = []
    user_sq: list[Tensor] = []
    shared_sq: list[Tensor] = []
    other_sq: list[Tensor] = []
    for index, (user, alignment) in enumerate(zip(user_grads, alignment_grads, strict=True)):
        # Each rank that holds the same elements adds them up as well.
        share = 1 / _held(user, alignment) if sharded else 1.0
        user, alignment = _local(user), _local(alignment)
        if user is not None and alignment is not None:
            if user.layout != alignment.layout:
                raise ValueError(
                    f"Gradient {index}: user-task layout {user.layout} != alignment layout "
                    f"{alignment.layout}. Build both with the same model."
                )
            both.append((_dense(user, alignment), share))
        elif user is not None:
            user_only.append((_dense(user), share))
        elif alignment is not None:
            alignment_only.append((_dense(alignment), share))
    for block in blocks(both):
        u, a = block.values
        cross.append(_dot(u, a, block.weight))
        user_sq.append(_dot(u, u, block.weight))
        shared_sq.append(_dot(a, a, block.weight))
    for squares, one_sided in ((user_sq, user_only), (other_sq, alignment_only)):
        for block in blocks(one_sided):
            (value,) = block.values
            squares.append(_dot(value, value, block.weight))
    device = _device(user_grads, alignment_grads)
    sums = torch.stack([_total(values, device) for values in (cross, user_sq, shared_sq, other_sq)])
    inner, user_total, shared, other = (sum_over_ranks(sums) if sharded else sums).unbind()
    return GradientProducts(
        inner_product=inner,
        user_sq_norm=user_total,
        alignment_sq_norm=shared + other,
        shared_alignment_sq_norm=shared,
        eps=_eps(user_grads, alignment_grads),
    )


def project_conflicting(user_grads: Gradients, alignment_grads: Gradients) -> list[Tensor | None]:
    """Remove from the user gradient its component against the alignment gradient.

    g'_user = g_user - (min(0, <g_user, g_align>) / ||g_align||^2) g_align    (Eq. 3 and 4)

    The sums run over the parameters that have both gradients; where either is `None`, the entry of
    `user_grads` is returned as it is, because the user's step does not move what it has no gradient for.

    Args:
        user_grads: gradients of the user's loss, `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss; same order, shapes, dtypes and devices.

    Returns:
        New tensors with the dtypes of `user_grads`; `None` where the user gradient is `None`.

    Raises:
        ValueError: the lists cannot be combined, see `check_gradients`.
    """
    projected, _ = combine(user_grads, alignment_grads, rho=0.0)
    return [None if user is None else gradient for user, gradient in zip(user_grads, projected, strict=True)]


def combine(
    user_grads: Gradients, alignment_grads: Gradients, rho: float = 1.0
) -> tuple[list[Tensor | None], SurgeryStats]:
    """Project the user gradient and add the alignment gradient, leaving both lists as they are.

    g = g'_user + rho g_align    (Eq. 5, g'_user as in `project_conflicting`)

    Args:
        user_grads: gradients of the user's loss, `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss; same order, shapes, dtypes and devices.
        rho: weight of the alignment gradient, >= 0.

    Returns:
        New tensors (`rho g_align` where there is no user gradient, `None` where there is neither)
        and the statistics of the step.

    Raises:
        ValueError: `rho` is negative or not finite, or the lists cannot be combined.
    """
    copies = [None if user is None else user.clone() for user in user_grads]
    return combine_(copies, alignment_grads, rho)


@torch.no_grad()
def combine_(
    user_grads: Gradients,
    alignment_grads: Gradients,
    rho: float = 1.0,
    products: GradientProducts | None = None,
) -> tuple[list[Tensor | None], SurgeryStats]:
    """In-place twin of `combine`: the tensors of `user_grads` become the final gradient.

    Extra memory is one block of each gradient, not a copy of it; `alignment_grads` is only read.

    Args:
        user_grads: gradients of the user's loss, overwritten; `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss; same order, shapes, dtypes and devices.
        rho: weight of the alignment gradient, >= 0.
        products: `inner_products` of the same lists, when the caller has them already.

    Returns:
        The tensors of `user_grads`, with a new tensor `rho g_align` where there was no user gradient,
        and the statistics of the step.

    Raises:
        ValueError: `rho` is negative or not finite, or the lists cannot be combined.
    """
    if not 0.0 <= rho < float("inf"):
        raise ValueError(f"rho is {rho}, expected a finite number >= 0 (the paper uses 1).")
    if products is None:
        products = inner_products(user_grads, alignment_grads)
    conflict, negligible, coefficient = _decide(products, rho)

    final = [
        alignment * rho if user is None and alignment is not None else user
        for user, alignment in zip(user_grads, alignment_grads, strict=True)
    ]
    pairs = [
        (local(user), local(alignment))
        for user, alignment in zip(user_grads, alignment_grads, strict=True)
        if user is not None and alignment is not None
    ]
    narrow = [pair for pair in pairs if pair[0].dtype.to_real() != widened_dtype(pair[0].dtype)]
    if narrow and _is_sharded(user_grads, alignment_grads):
        # What this rank can tell is its part, and the sum over ranks would be another all-reduce.
        left_by_rounding = torch.full_like(coefficient, torch.nan)
    else:
        left_by_rounding = _left_by_rounding(narrow, coefficient)
    _add_(pairs, coefficient)

    shared_sq = products.shared_alignment_sq_norm
    user_norm, alignment_norm = products.user_sq_norm.sqrt(), products.alignment_sq_norm.sqrt()
    removal = coefficient - rho
    residual_norm = _norm_of_sum(products, removal)
    residual_product = products.inner_product + removal * shared_sq + left_by_rounding
    unshared_sq = products.alignment_sq_norm - shared_sq
    stats = SurgeryStats(
        inner_product=products.inner_product,
        cosine=_cosine(products.inner_product, user_norm, alignment_norm),
        user_norm=user_norm,
        alignment_norm=alignment_norm,
        conflict=conflict,
        negligible=negligible,
        residual_cosine=_cosine(residual_product, residual_norm, alignment_norm),
        final_norm=(_norm_of_sum(products, coefficient) ** 2 + rho**2 * unshared_sq).sqrt(),
    )
    return final, stats


def _decide(products: GradientProducts, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the gradients conflict, whether g_align is noise, and c of g = g_user + c g_align."""
    inner, shared_sq = products.inner_product, products.shared_alignment_sq_norm
    # Relative to the user gradient, so that the decision does not depend on the scale of either loss.
    # Not-greater instead of smaller: with two zero gradients the alignment gradient is negligible too.
    negligible = ~(products.alignment_sq_norm > products.eps**2 * products.user_sq_norm)
    conflict = (inner < 0) & ~negligible
    divisor = torch.where(conflict, shared_sq, torch.ones_like(shared_sq))
    removal = torch.where(conflict, -inner / divisor, torch.zeros_like(inner))
    return conflict, negligible, rho + removal


def _add_(pairs: Sequence[tuple[Tensor, Tensor]], coefficient: Tensor) -> None:
    """u += c a for each pair (u, a), computed in fp32 or better and rounded once."""
    scale = cache(coefficient.to)
    dense: list[Weighted] = []
    for user, alignment in pairs:
        if user.is_sparse:
            wide = torch.promote_types(user.dtype, torch.float32)
            user.add_(alignment.to(wide) * scale(user.device, wide))
        else:
            dense.append(((user, alignment), 1.0))
    if _is_on_cpu(dense):
        # Nothing is waited for here, and with c as a number one kernel takes half precision through fp32.
        # add_(alpha=c) would not do: on a CPU it rounds the product as well.
        number, one = coefficient.item(), cache(partial(torch.ones, ()))
        for (user, alignment), _ in dense:
            user.addcmul_(alignment, one(dtype=user.dtype), value=number)
        return
    for block in blocks(dense):
        u, a = block.values
        u.addcmul_(a, scale(u.device, u.dtype))
        block.write_first()


def _is_on_cpu(gradients: Sequence[Weighted]) -> bool:
    return all(tensors[0].device.type == "cpu" for tensors, _ in gradients)


def _left_by_rounding(pairs: Sequence[tuple[Tensor, Tensor]], coefficient: Tensor) -> Tensor:
    """<round(u + c a) - (u + c a), a> over pairs (u, a), before any of them is changed.

    Of many elements it is estimated on a sample, to some 1e-5 of ||u + c a|| ||a||.
    """
    dense = [_dense(*pair) for pair in pairs]
    # Odd, so that with rows of any power of two the runs are not of the same columns.
    every = sum(user.numel() for user, _ in dense) // _SAMPLE | 1
    scale = cache(coefficient.to)
    products: list[Tensor] = []
    for block in blocks([_sample(pair, every) for pair in dense]):
        u, a = block.values
        u.addcmul_(a, scale(u.device, u.dtype))
        rounded = u.to(block.parts[0][0].dtype)
        products.append(_dot(rounded.to(u.dtype).sub_(u), a, block.weight))
    return _total(products, coefficient.device)


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


def _norm_of_sum(products: GradientProducts, coefficient: Tensor) -> Tensor:
    """||g_user + c g_align|| over the parameters that have a user gradient."""
    moved = 2 * products.inner_product + coefficient * products.shared_alignment_sq_norm
    return (products.user_sq_norm + coefficient * moved).clamp(min=0).sqrt()


def _traits(gradient: Tensor) -> tuple[object, ...]:
    return tuple(gradient.shape), gradient.dtype, gradient.device, placement(gradient)


def _is_sharded(*lists: Gradients) -> bool:
    return any(g is not None and is_distributed_tensor(g) for gradients in lists for g in gradients)


def _held(user: Tensor | None, alignment: Tensor | None) -> int:
    """How many ranks hold the elements of an entry that this one holds, and so add them up as well."""
    gradient = alignment if user is None else user
    return 1 if gradient is None else copies(gradient)


def _local(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else local(gradient)


def _dense(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Sparse COO gradients as their values on the union of their indices, zeros where one has none."""
    if not gradients[0].is_sparse:
        return gradients
    union = sum((gradient.detach() * 0 for gradient in gradients[1:]), gradients[0].detach() * 0)
    return tuple((gradient + union).coalesce().values() for gradient in gradients)


def _dot(left: Tensor, right: Tensor, weight: float = 1.0) -> Tensor:
    product = torch.dot(left, right)
    return product if weight == 1.0 else product.double() * weight


def _total(sums: list[Tensor], device: torch.device) -> Tensor:
    wide = torch.float32 if device.type == "mps" else torch.float64
    if not sums:
        return torch.zeros((), dtype=wide, device=device)
    return torch.stack([value.to(device) for value in sums]).to(wide).sum()


def _cosine(inner_product: Tensor, norm: Tensor, other_norm: Tensor) -> Tensor:
    product = norm * other_norm
    zero = product == 0
    return torch.where(zero, torch.zeros_like(product), inner_product / (product + zero)).clamp(-1, 1)


def _device(*lists: Gradients) -> torch.device:
    for gradients in lists:
        for gradient in gradients:
            if gradient is not None:
                return gradient.device
    return torch.device("cpu")


def _eps(*lists: Gradients) -> float:
    present = [g.dtype for gradients in lists for g in gradients if g is not None]
    return max((torch.finfo(widened_dtype(dtype)).eps for dtype in present), default=0.0)
