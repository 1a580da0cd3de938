"""How P_ref is read: computed at each call, or from what was kept of it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from safegrad_optim.batches import Part
from safegrad_optim.forward import forward_at
from safegrad_optim.reference._cache import ReferenceCache, fingerprint
from safegrad_optim.reference._kind import Kind, head_is_frozen, head_weights
from safegrad_optim.reference._options import Reference
from safegrad_optim.reference._source import ReferenceSource


class Reading:
    """P_ref on safety batches of a digest: computed at each call, until it is kept."""

    cache: ReferenceCache | None = None

    def __init__(
        self, source: ReferenceSource, kind: Kind, autocast_dtype: torch.dtype | None, digest: str
    ) -> None:
        self.source = source
        self.kind = kind
        self.autocast_dtype = autocast_dtype
        precision = f"{kind.label}, autocast {autocast_dtype}"
        self.identity = fingerprint(source.named_parameters(), digest, precision)

    def divergence(self, model: nn.Module, part: Part) -> Tensor:
        """Return the sum of KL(P_ref || P_model) over the compared positions of a part."""
        head: tuple[Tensor, ...] = ()
        if self.cache is None:
            reference = self.source.outputs(part, self.autocast_dtype)
            entry, precision = self.kind.keep(reference), reference.precision
        else:
            # A copy, also on the CPU: where memory is mapped or cut it may be aligned in another way than
            # where it was computed, and kernels may then add in another order.
            entry = tuple(tensor[part.tokens].clone() for tensor in self.cache.entries[part.batch])
            precision, head = self.cache.precision, self.cache.head
        states = (entry[0], *head) if self.kind.name == "hidden" else ()
        if len(states) == 1 and not head_is_frozen(model):
            raise ValueError(
                "The output head became trainable after its reference was cached as hidden states. "
                "Set requires_grad before building KLAlignment, which then keeps the head or logits."
            )
        output = forward_at(model, part.inputs, part.mask, states)
        if precision != output.precision:
            raise RuntimeError(
                f"The reference was computed with {precision}; the model now gives {output.precision}. Build "
                "the alignment after the model is in its final precision (after accelerator.prepare), or "
                "give it the autocast_dtype of training."
            )
        return self.kind.divergence(entry, output.logits)

    def keep(self, options: Reference, parts: Iterator[Part]) -> None:
        """Read the reference from its file if there is one, else compute it on `parts` and keep it."""
        path = None if options.file is None else Path(options.file)
        drifted = options.resumed and self.source.drifts
        if path is not None and path.exists():
            self.cache, self.identity = ReferenceCache.load(path, self.identity, check_weights=not drifted)
            return
        if drifted:
            raise ValueError(
                "The model has been fine-tuned (resumed=True), so its reference cannot be computed from it, "
                f"and the cache file is {f'missing: {path}' if path else 'not given'}. Give Reference("
                "file=...) of the original run, or the aligned model as Reference(ref_model=...)."
            )
        self.cache = self._computed(parts)
        if path is not None:
            self.cache.save(path, self.identity)

    def _computed(self, parts: Iterator[Part]) -> ReferenceCache:
        batches: dict[int, list[tuple[Tensor, ...]]] = {}
        for part in parts:
            output = self.source.outputs(part, self.autocast_dtype)
            kept = batches.setdefault(part.batch, [])
            # What is run to keep pace with other ranks is kept only where there is nothing else.
            if part.weight or not kept:
                kept.append(tuple(tensor.cpu() for tensor in self.kind.keep(output)))
        entries = [tuple(map(torch.cat, zip(*kept, strict=True))) for kept in batches.values()]
        with self.source.open() as model:
            weights = head_weights(model) if self.kind.keeps_head else ()
            head = tuple(tensor.detach().to("cpu", copy=True) for tensor in weights)
        return ReferenceCache(entries, self.kind.name, output.precision, head)
