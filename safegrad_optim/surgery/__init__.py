"""Gradient surgery on lists of tensors: the math of SafeGrad and nothing else.

In come the user gradient u and the alignment gradient a, one tensor or `None` for each parameter; out come
the final gradient and the statistics of the step. With the sums of both lists as one vector each,

    g = u + c a,    c = rho + max(0, -<u, a>) / ||a||^2        (Eq. 3 to 5 of the paper in one)

>>> import torch
>>> from safegrad_optim import combine
>>> final, stats = combine([torch.tensor([-1.0, 3.0])], [torch.tensor([1.0, 0.0])], rho=0.5)
>>> final, bool(stats.conflict)
([tensor([0.5000, 3.0000])], True)

Nothing here waits for a device. Sums are accumulated in fp32 or better, and every gradient is rounded once.
Sharded gradients (DTensors) stay where they are: each rank sums over its own part, each element is counted
once, and one all-reduce of the sums gives every rank the same decision.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 3-5.
"""

from safegrad_optim.surgery._coefficient import ConstantRho, decide
from safegrad_optim.surgery._combine import combine, combine_, project_conflicting, update_
from safegrad_optim.surgery._pairs import Gradients, Pairs, take_apart
from safegrad_optim.surgery._products import GradientProducts, inner_products, sums_of
from safegrad_optim.surgery._stats import SurgeryStats, surgery_stats

__all__ = [
    "ConstantRho",
    "GradientProducts",
    "Gradients",
    "Pairs",
    "SurgeryStats",
    "combine",
    "combine_",
    "decide",
    "inner_products",
    "project_conflicting",
    "sums_of",
    "surgery_stats",
    "take_apart",
    "update_",
]
