"""SafeGrad inside the optimizer: fine-tune a safety-aligned LLM without losing its refusals.

At each step the user gradient loses its component against the alignment gradient, that of
KL(P_ref || P_model) on a small safety batch, which is then added with weight `rho`:

    from safegrad_optim import KLAlignment, SafeGradOptimizer, safety_sources

    sources = safety_sources(model, tokenizer, training_data)
    alignment = KLAlignment(model, sources)             # P_ref: the model before fine-tuning
    optimizer = SafeGradOptimizer(AdamW(model.parameters(), lr=2e-4), alignment)
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()                                # alignment gradient, surgery, base step
        optimizer.zero_grad()

The math alone is in `project_conflicting` and `combine`, pure functions on lists of tensors.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172.
"""

from safegrad_optim.alignment import KLAlignment, LossAlignment
from safegrad_optim.batches import SafetySource
from safegrad_optim.divergence import kl_divergence
from safegrad_optim.optimizer import ChainedOptimizer, SafeGradOptimizer, StepCounts, UnprotectedStepError
from safegrad_optim.protection import Protection, ProtectionCheck, ProtectionLostError
from safegrad_optim.reference import Reference
from safegrad_optim.safety_data import (
    RowAudit,
    SafetySources,
    audit_rows,
    is_refusal,
    safety_rows,
    safety_sources,
    shipped_harmless_prompts,
    shipped_requests,
    with_prompt_prefixes,
)
from safegrad_optim.surgery import (
    GradientProducts,
    SurgeryStats,
    combine,
    combine_,
    inner_products,
    project_conflicting,
)

__version__ = "0.1.0"

# To train with, for safety rows, what is said of a step, and the math alone.
__all__ = [
    "ChainedOptimizer",
    "KLAlignment",
    "LossAlignment",
    "Reference",
    "SafeGradOptimizer",
    "SafetySource",
]
__all__ += ["SafetySources", "is_refusal", "safety_rows", "safety_sources", "with_prompt_prefixes"]
__all__ += ["shipped_harmless_prompts", "shipped_requests"]
__all__ += ["Protection", "ProtectionCheck", "ProtectionLostError", "RowAudit", "audit_rows"]
__all__ += ["GradientProducts", "StepCounts", "SurgeryStats", "UnprotectedStepError"]
__all__ += ["combine", "combine_", "inner_products", "kl_divergence", "project_conflicting"]
