"""Lisa, a baseline: steps on user and on safety data in turns, each held near where its turn began.

In each state the loss has a proximal term to the parameters at the last switch:

    loss(theta) + (strength / 2) ||theta - theta_switch||^2

Reference: Huang et al., *Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning
Attack*, arXiv 2405.18641, Algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Proximal"]


class Proximal:
    """The proximal term of one optimizer's parameters.

    Args:
        parameters: what is trained.
        strength: weight of the term; the paper's default is 1.
    """

    def __init__(self, parameters: Sequence[Tensor], strength: float = 1.0) -> None:
        self.parameters = list(parameters)
        self.strength = strength
        self.switch()

    @torch.no_grad()
    def switch(self) -> None:
        """Begin the other state: from now on the term holds the parameters where they are."""
        self._anchor = [parameter.clone() for parameter in self.parameters]

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add strength (theta - theta_switch) to the gradients."""
        for parameter, anchor in zip(self.parameters, self._anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=self.strength)
