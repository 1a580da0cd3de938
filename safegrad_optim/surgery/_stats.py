"""What a step of surgery saw and did, from the sums that decided it."""

from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.surgery._coefficient import Decision
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
    final_norm: Tensor
    """||g'_user + rho g_align||, before rounding and clipping."""

    def to_dict(self) -> dict[str, float]:
        """Read all values to the host at once, as floats by field name."""
        values = torch.stack([value.double().cpu() for value in self])
        return dict(zip(self._fields, values.tolist(), strict=True))


def surgery_stats(products: GradientProducts, decision: Decision) -> SurgeryStats:
    """Make the statistics of a step from its sums and what was decided by them."""
    user_norm, alignment_norm = products.user_sq_norm.sqrt(), products.alignment_sq_norm.sqrt()
    unshared_sq = products.alignment_sq_norm - products.shared_alignment_sq_norm
    # Of the parameters that have a user gradient, then of all.
    moved = 2 * products.inner_product + decision.coefficient * products.shared_alignment_sq_norm
    combined_sq = (products.user_sq_norm + decision.coefficient * moved).clamp(min=0)
    return SurgeryStats(
        inner_product=products.inner_product,
        cosine=_cosine(products.inner_product, user_norm * alignment_norm),
        user_norm=user_norm,
        alignment_norm=alignment_norm,
        conflict=decision.conflict,
        negligible=products.negligible,
        final_norm=(combined_sq + decision.rho**2 * unshared_sq).sqrt(),
    )


def _cosine(inner_product: Tensor, norms: Tensor) -> Tensor:
    zero = norms == 0
    return torch.where(zero, torch.zeros_like(norms), inner_product / (norms + zero)).clamp(-1, 1)
