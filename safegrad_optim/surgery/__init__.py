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
Sharded gradients (DTensors) stay where they are: one all-reduce of the sums gives all ranks one decision.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 3-5.
"""

from safegrad_optim.surgery._combine import combine, combine_, combine_pairs_, project_conflicting
from safegrad_optim.surgery._decision import ConstantRho, SurgeryStats, decide
from safegrad_optim.surgery._pairs import Gradients, Pairs, take_apart
from safegrad_optim.surgery._products import GradientProducts, inner_products, sums_of

__all__ = ["GradientProducts", "SurgeryStats", "combine", "combine_", "inner_products", "project_conflicting"]
# What a step of the optimizer is made of.
__all__ += ["ConstantRho", "Gradients", "Pairs", "combine_pairs_", "decide", "sums_of", "take_apart"]
