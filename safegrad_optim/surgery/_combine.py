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

import torch
from torch import Tensor

from safegrad_optim.parallel import local
from safegrad_optim.surgery._blocks import Weighted, blocks, in_cache, widened_dtype
from safegrad_optim.surgery._checks import Gradients
from safegrad_optim.surgery._products import GradientProducts, inner_products, is_sharded
from safegrad_optim.surgery._rounding import left_by_rounding
from safegrad_optim.surgery._stats import SurgeryStats, surgery_stats


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
    if narrow and is_sharded(user_grads, alignment_grads):
        # What this rank can tell is its part, and the sum over ranks would be another all-reduce.
        rounding = torch.full_like(coefficient, torch.nan)
    else:
        rounding = left_by_rounding(narrow, coefficient)
    _add_(pairs, coefficient)
    return final, surgery_stats(products, conflict, negligible, coefficient, rho, rounding)


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
        for user, alignment in in_cache([pair for pair, _ in dense]):
            user.addcmul_(alignment, one(dtype=user.dtype), value=number)
        return
    for block in blocks(dense):
        u, a = block.values
        u.addcmul_(a, scale(u.device, u.dtype))
        block.write_first()


def _is_on_cpu(gradients: Sequence[Weighted]) -> bool:
    return all(tensors[0].device.type == "cpu" for tensors, _ in gradients)
