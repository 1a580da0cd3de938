"""The optimizer wrapper: surgery inside the step of any torch optimizer.

In come the `.grad` of the parameters and an alignment gradient, pulled from a callable or pushed before the
step; out comes the base optimizer's step on the final gradient, or an error with nothing changed.

>>> import torch
>>> from safegrad_optim import SafeGradOptimizer
>>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
>>> optimizer = SafeGradOptimizer(torch.optim.SGD([weight], lr=0.1), rho=1.0)
>>> (weight * torch.tensor([-1.0, 3.0])).sum().backward()
>>> optimizer.set_alignment_grad([torch.tensor([1.0, 0.0])])
>>> optimizer.step()
>>> weight.detach(), optimizer.counts.conflicts
(tensor([0.9000, 0.7000]), 1)

It knows no alignment by name: whatever gives one gradient for each trainable parameter will do.
"""

from safegrad_optim.optimizer._chained import ChainedOptimizer
from safegrad_optim.optimizer._checks import UnprotectedStepError
from safegrad_optim.optimizer._optimizer import SafeGradOptimizer
from safegrad_optim.optimizer._state import StepCounts

__all__ = ["ChainedOptimizer", "SafeGradOptimizer", "StepCounts", "UnprotectedStepError"]
