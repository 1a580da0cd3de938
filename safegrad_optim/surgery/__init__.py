"""Gradient surgery on lists of tensors: the math of SafeGrad and nothing else.

In come the user gradient u and the alignment gradient a, one tensor or `None` for each parameter; out come
the final gradient and the statistics of the step. With the sums of both lists as one vector each,

    g = u + c a,    c = rho + max(0, -<u, a>) / ||a||^2        (Eq. 3 to 5 of the paper in one)

>>> import torch
>>> from safegrad_optim import combine
>>> final, stats = combine([torch.tensor([-1.0, 3.0])], [torch.tensor([1.0, 0.0])], rho=0.5)
>>> final, bool(stats.conflict)
([tensor([0.5000, 3.0000])], True)

Nothing here waits for a device, except that a CPU's coefficient is read as a number. Sharded gradients
(DTensors) stay where they are: one all-reduce of four sums gives every rank the same decision.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 3-5.
"""

from safegrad_optim.surgery._checks import Gradients, check_gradients
from safegrad_optim.surgery._combine import combine, combine_, project_conflicting
from safegrad_optim.surgery._products import GradientProducts, inner_products
from safegrad_optim.surgery._stats import SurgeryStats

__all__ = [
    "GradientProducts",
    "Gradients",
    "SurgeryStats",
    "check_gradients",
    "combine",
    "combine_",
    "inner_products",
    "project_conflicting",
]
