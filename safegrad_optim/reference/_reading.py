"""How P_ref is read: computed at each call, or from what was kept of it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from safegrad_optim.batches import Part
from safegrad_optim.divergence import kl_divergence
from safegrad_optim.forward import (
    FinalStates,
    Outputs,
    autocast,
    check_precision,
    forward_at,
    unchanged_evaluation,
)
from safegrad_optim.parallel import synchronized
from safegrad_optim.reference._cache import ReferenceCache
from safegrad_optim.reference._fingerprint import Fingerprint
from safegrad_optim.reference._kind import Kind, head_is_frozen, head_weights
from safegrad_optim.reference._options import Reference
from safegrad_optim.reference._source import ReferenceSource


class LiveReference:
    """P_ref computed at each call."""

    cache: ReferenceCache | None = None

    def __init__(self, source: ReferenceSource, autocast_dtype: torch.dtype | None) -> None:
        self.source = source
        self.autocast_dtype = autocast_dtype

    def divergence(self, model: nn.Module, part: Part) -> Tensor:
        """Return the sum of KL(P_ref || P_model) over the compared positions of a part."""
        reference = self.outputs(part)
        output = forward_at(model, part.inputs, part.mask)
        check_precision(reference.precision, output.precision)
        return kl_divergence(reference.logits.to(output.logits.device), output.logits)

    @torch.no_grad()
    def outputs(self, part: Part) -> Outputs:
        """Return what the reference gives at the compared positions of a part."""
        with (
            self.source.open() as model,
            synchronized(model),
            unchanged_evaluation(model),
            autocast(model, self.autocast_dtype),
        ):
            device = next(model.parameters()).device
            inputs = {name: value.to(device) for name, value in part.inputs.items()}
            return forward_at(model, inputs, part.mask.to(device))


class CachedReference:
    """P_ref as it was kept."""

    def __init__(self, kind: Kind, cache: ReferenceCache) -> None:
        self.kind = kind
        self.cache = cache

    def divergence(self, model: nn.Module, part: Part) -> Tensor:
        """Return the sum of KL(P_ref || P_model) over the compared positions of a part."""
        # A copy, also on the CPU: where memory is mapped or cut it may be aligned in another way than where
        # it was computed, and kernels may then add in another order.
        entry = tuple(tensor[part.tokens].clone() for tensor in self.cache.entries[part.batch])
        states = FinalStates(entry[0], self.cache.head) if self.kind.name == "hidden" else None
        if states is not None and not states.head and not head_is_frozen(model):
            raise ValueError(
                "The output head became trainable after its reference was cached as hidden states. "
                "Set requires_grad before building KLAlignment, which then keeps the head or logits."
            )
        output = forward_at(model, part.inputs, part.mask, states)
        check_precision(self.cache.precision, output.precision)
        return self.kind.divergence(entry, output.logits)


def cached_reference(
    options: Reference, kind: Kind, live: LiveReference, identity: Fingerprint, parts: Iterator[Part]
) -> tuple[CachedReference, Fingerprint]:
    """Read the reference from its file if there is one, else compute it on `parts`, and keep it there.

    Returns:
        The reference, and the fingerprint of what it was computed from.

    Raises:
        ValueError: the model is no longer the reference, or the file is of another one.
    """
    path = None if options.file is None else Path(options.file)
    drifted = options.resumed and live.source.drifts
    if drifted and (path is None or not path.exists()):
        raise ValueError(
            "The model has been fine-tuned (resumed=True), so its reference cannot be computed from it, and "
            f"the cache file is {'missing: ' + str(path) if path else 'not given'}. Give Reference(file=...) "
            "of the original run, or the aligned model as Reference(ref_model=...)."
        )
    if path is not None and path.exists():
        cache, identity = ReferenceCache.load(path, identity, check_weights=not drifted)
    else:
        cache = _computed(kind, live, parts)
        if path is not None:
            cache.save(path, identity)
    return CachedReference(kind, cache), identity


def _computed(kind: Kind, live: LiveReference, parts: Iterator[Part]) -> ReferenceCache:
    batches: dict[int, list[tuple[Tensor, ...]]] = {}
    for part in parts:
        output = live.outputs(part)
        kept = batches.setdefault(part.batch, [])
        # What is run to keep pace with other ranks is kept only where there is nothing else.
        if part.weight or not kept:
            kept.append(tuple(tensor.cpu() for tensor in kind.keep(output)))
    entries = [tuple(map(torch.cat, zip(*kept, strict=True))) for kept in batches.values()]
    with live.source.open() as model:
        weights = head_weights(model) if kind.keeps_head else ()
        head = tuple(tensor.detach().to("cpu", copy=True) for tensor in weights)
    return ReferenceCache(entries, kind.name, output.precision, head)
