"""P_ref: where it comes from, what of it is kept and where, and how it is read back.

In come the model, or a second one, and the parts of safety batches that a rank computes; out comes the sum of
KL(P_ref || P_model) over their compared tokens, with P_ref computed anew or read from what was kept.

>>> from safegrad_optim import Reference
>>> Reference(file="reference.safetensors", cache="logits").resumed
False
>>> Reference(cache="some")
Traceback (most recent call last):
ValueError: cache is 'some', expected one of ('exact', 'hidden', 'logits', 'top_k') or None.
"""

from safegrad_optim.divergence import top_k_kl_divergence
from safegrad_optim.reference._cache import ReferenceCache, fingerprint
from safegrad_optim.reference._reading import Reading, read_references
from safegrad_optim.reference._source import Reference, ReferenceSource, reference_source
from safegrad_optim.reference._trained import remember
from safegrad_optim.reference._watch import marks_of

__all__ = ["Reading", "Reference", "ReferenceCache", "ReferenceSource", "read_references"]
__all__ += [
    "fingerprint",
    "marks_of",
    "reference_source",
    "remember",
    "top_k_kl_divergence",
]  # the last is what `Reference` speaks of
