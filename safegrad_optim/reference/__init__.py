"""P_ref: where it comes from, what of it is kept and where, and how it is read back.

In come the model, or a second one, and safety batches; out comes KL(P_ref || P_model) of some of their rows,
with P_ref computed anew or read from what was kept.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
"""

from safegrad_optim.reference._cache import ReferenceCache, fingerprint
from safegrad_optim.reference._kind import CacheKind, Kind, choose_kind, head_is_frozen, head_weights
from safegrad_optim.reference._source import AdaptersOff, CurrentModel, FrozenModel, is_peft_model
from safegrad_optim.reference._top_k import TopK, top_k_kl_divergence, top_k_log_probs

__all__ = [
    "AdaptersOff",
    "CacheKind",
    "CurrentModel",
    "FrozenModel",
    "Kind",
    "ReferenceCache",
    "TopK",
    "choose_kind",
    "fingerprint",
    "head_is_frozen",
    "head_weights",
    "is_peft_model",
    "top_k_kl_divergence",
    "top_k_log_probs",
]
