"""What the sums of a step decide: rho, the conflict, and c of g = g_user + c g_align."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.surgery._products import GradientProducts


class ConstantRho:
    """The weight of the alignment gradient as a function of the sums of a step: rho, whatever they are.

    Raises:
        ValueError: rho is negative or not finite.
    """

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


class Decision(NamedTuple):
    """What is done with two gradients."""

    conflict: Tensor
    """Whether <g_user, g_align> < 0, and so g_user is projected: a 0-dim bool tensor."""
    rho: float
    coefficient: Tensor
    """c = rho + max(0, -<g_user, g_align>) / ||g_align||^2, a 0-dim tensor."""


def decide(products: GradientProducts, rho: float) -> Decision:
    """Decide from its sums what a step does; without waiting for the device."""
    inner, shared_sq = products.inner_product, products.shared_alignment_sq_norm
    conflict = (inner < 0) & ~products.negligible
    divisor = torch.where(conflict, shared_sq, torch.ones_like(shared_sq))
    removal = torch.where(conflict, -inner / divisor, torch.zeros_like(inner))
    return Decision(conflict, rho, rho + removal)
