"""What a step of surgery saw and did, from the sums that decided it."""

from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.surgery._products import GradientProducts


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


def surgery_stats(
    products: GradientProducts,
    conflict: Tensor,
    negligible: Tensor,
    coefficient: Tensor,
    rho: float,
    left_by_rounding: Tensor,
) -> SurgeryStats:
    """Make the statistics of a step g = u + c a from its sums.

    Args:
        products: sums over the gradients before surgery.
        conflict: whether the gradients conflict.
        negligible: whether the alignment gradient is noise.
        coefficient: c.
        rho: the part of c that is not projection.
        left_by_rounding: <round(g) - g, a> where it was measured.
    """
    shared_sq = products.shared_alignment_sq_norm
    user_norm, alignment_norm = products.user_sq_norm.sqrt(), products.alignment_sq_norm.sqrt()
    removal = coefficient - rho
    residual_product = products.inner_product + removal * shared_sq + left_by_rounding
    unshared_sq = products.alignment_sq_norm - shared_sq
    return SurgeryStats(
        inner_product=products.inner_product,
        cosine=_cosine(products.inner_product, user_norm, alignment_norm),
        user_norm=user_norm,
        alignment_norm=alignment_norm,
        conflict=conflict,
        negligible=negligible,
        residual_cosine=_cosine(residual_product, _norm_of_sum(products, removal), alignment_norm),
        final_norm=(_norm_of_sum(products, coefficient) ** 2 + rho**2 * unshared_sq).sqrt(),
    )


def _norm_of_sum(products: GradientProducts, coefficient: Tensor) -> Tensor:
    """||g_user + c g_align|| over the parameters that have a user gradient."""
    moved = 2 * products.inner_product + coefficient * products.shared_alignment_sq_norm
    return (products.user_sq_norm + coefficient * moved).clamp(min=0).sqrt()


def _cosine(inner_product: Tensor, norm: Tensor, other_norm: Tensor) -> Tensor:
    product = norm * other_norm
    zero = product == 0
    return torch.where(zero, torch.zeros_like(product), inner_product / (product + zero)).clamp(-1, 1)
