"""P_ref: where it comes from, what of it is kept and where, and how it is read back.

In come the model, or a second one, and the parts of safety batches that a rank computes; out comes the sum of
KL(P_ref || P_model) over their compared tokens, with P_ref computed anew or read from what was kept.

>>> import torch
>>> from safegrad_optim import Reference
>>> Reference(file="reference.safetensors", cache="logits").resumed
False
>>> Reference(cache="some")
Traceback (most recent call last):
ValueError: cache is 'some', expected one of ('exact', 'hidden', 'logits', 'top_k') or None.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
"""

from safegrad_optim.reference._cache import ReferenceCache
from safegrad_optim.reference._fingerprint import fingerprint
from safegrad_optim.reference._kind import choose_kind
from safegrad_optim.reference._options import Reference
from safegrad_optim.reference._reading import CachedReference, LiveReference, cached_reference
from safegrad_optim.reference._source import ReferenceSource, reference_source
from safegrad_optim.reference._top_k import top_k_kl_divergence

__all__ = [
    "CachedReference",
    "LiveReference",
    "Reference",
    "ReferenceCache",
    "ReferenceSource",
    "cached_reference",
    "choose_kind",
    "fingerprint",
    "reference_source",
    "top_k_kl_divergence",
]
