"""What the sums of a step decide: rho, the conflict, c of g = g_user + c g_align, and its statistics."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.surgery._products import GradientProducts


class ConstantRho:
    """The weight of the alignment gradient as a function of the sums of a step: rho, whatever they are."""

    def __init__(self, rho: float) -> None:
        if not 0.0 <= rho < math.inf:
            raise ValueError(f"rho is {rho}, expected a finite number >= 0 (the paper uses 1).")
        self.rho = rho

    def __call__(self, products: GradientProducts) -> float:
        """Return rho of the step with these sums."""
        return self.rho

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs to go on with the same rho."""
        return {"rho": self.rho}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with the rho of the run that saved `state`."""
        self.rho = state["rho"]


class SurgeryStats(NamedTuple):
    """What one step of surgery saw and did; each a 0-dim tensor on the gradients' device.

    Reading a value (`float(stats.cosine)`, `stats.to_dict()`) is what waits for the device.
    """

    inner_product: Tensor  #: <g_user, g_align> before surgery
    cosine: Tensor  #: of the two gradients before surgery; 0 where either is zero
    user_norm: Tensor  #: ||g_user|| before surgery
    alignment_norm: Tensor  #: ||g_align||
    conflict: Tensor  #: whether <g_user, g_align> < 0 (Eq. 3) and so g_user was projected
    negligible: Tensor  #: whether g_align was zero or below the rounding of g_user: a plain step
    final_norm: Tensor  #: ||g'_user + rho g_align||, before rounding and clipping

    def to_dict(self) -> dict[str, float]:
        """Read all values to the host at once, as floats by field name."""
        values = torch.stack([value.double().cpu() for value in self])
        return dict(zip(self._fields, values.tolist(), strict=True))


def decide(products: GradientProducts, rho: float) -> tuple[Tensor, SurgeryStats]:
    """Return c = rho + max(0, -<g_user, g_align>) / ||g_align||^2 as a 0-dim tensor, and the statistics."""
    inner, user_sq, alignment_sq, shared_sq, _ = products
    negligible = products.negligible
    conflict = (inner < 0) & ~negligible
    coefficient = rho + torch.where(conflict, -inner / shared_sq, 0.0)
    user_norm, alignment_norm = user_sq.sqrt(), alignment_sq.sqrt()
    norms = user_norm * alignment_norm
    # Of the parameters that have a user gradient, then of all.
    combined_sq = (user_sq + coefficient * (2 * inner + coefficient * shared_sq)).clamp(min=0)
    final_norm = (combined_sq + rho**2 * (alignment_sq - shared_sq)).sqrt()
    cosine = torch.where(norms == 0, 0.0, inner / norms).clamp(-1, 1)
    stats = SurgeryStats(inner, cosine, user_norm, alignment_norm, conflict, negligible, final_norm)
    return coefficient, stats
