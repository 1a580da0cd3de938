"""Eq. 4 and 5 of the paper (arXiv 2508.07172) on lists of tensors, in place or not."""

from functools import cache

import torch
from torch import Tensor

from safegrad_optim.surgery._decision import ConstantRho, SurgeryStats, decide
from safegrad_optim.surgery._pairs import Gradients, Pairs, take_apart
from safegrad_optim.surgery._products import GradientProducts, sums_of


def project_conflicting(user_grads: Gradients, alignment_grads: Gradients) -> list[Tensor | None]:
    """Remove from the user gradient its component against the alignment gradient.

    g'_user = g_user - (min(0, <g_user, g_align>) / ||g_align||^2) g_align    (Eq. 3 and 4)

    The sums run over the parameters that have both gradients; where either is `None`, the entry of
    `user_grads` is returned as it is, because the user's step does not move what it has no gradient for.
    Arguments and errors are those of `combine_`; the tensors returned are new.
    """
    projected, _ = combine(user_grads, alignment_grads, rho=0.0)
    return [None if user is None else gradient for user, gradient in zip(user_grads, projected, strict=True)]


def combine(
    user_grads: Gradients, alignment_grads: Gradients, rho: float = 1.0
) -> tuple[list[Tensor | None], SurgeryStats]:
    """Project the user gradient and add the alignment gradient, leaving both lists as they are.

    g = g'_user + rho g_align    (Eq. 5, g'_user as in `project_conflicting`)

    Arguments and errors are those of `combine_`; the tensors returned are new.
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

    g = g_user + c g_align,  c = rho + max(0, -<g_user, g_align>) / ||g_align||^2    (Eq. 3 to 5)

    Extra memory is a piece of each gradient, up to 64 MiB on a device and 8 on a CPU, not a copy of all;
    `alignment_grads` is only read.

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
        NotImplementedError: the sum over ranks of a DTensor is pending.
    """
    rule = ConstantRho(rho)
    gradients = take_apart(user_grads, alignment_grads)
    return combine_pairs_(gradients, sums_of(gradients) if products is None else products, rule)


def combine_pairs_(
    gradients: Pairs, products: GradientProducts, rho: ConstantRho
) -> tuple[list[Tensor | None], SurgeryStats]:
    """`combine_` for gradients that are taken apart already, with the sums over them."""
    weight = rho(products)
    coefficient, stats = decide(products, weight)
    scale = cache(coefficient.to)
    for piece in gradients.both:
        u, a = piece.values
        u.addcmul_(a, scale(u.device, u.dtype))
        piece.write_first()
    for user, alignment, _ in gradients.apart:
        wide = torch.promote_types(user.dtype, torch.float32)
        user.add_(alignment.to(wide) * scale(user.device, wide.to_real()))
    final = [
        alignment * weight if user is None and alignment is not None else user
        for user, alignment in zip(gradients.user_grads, gradients.alignment_grads, strict=True)
    ]
    return final, stats
