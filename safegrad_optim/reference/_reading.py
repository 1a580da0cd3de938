"""How P_ref is read: computed at each call, or from what was kept of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from safegrad_optim.batches import Part, SourceBatches
from safegrad_optim.forward import forward_at
from safegrad_optim.parallel import Share
from safegrad_optim.reference._cache import ReferenceCache, fingerprint
from safegrad_optim.reference._kind import Kind, choose_kind, head_is_frozen, head_weights
from safegrad_optim.reference._source import Reference, ReferenceSource


@dataclass
class Reading(ABC):
    """A way to P_ref on the safety batches of a source."""

    source: ReferenceSource
    kind: Kind
    identity: dict[str, str]  # its `fingerprint`
    autocast_dtype: torch.dtype | None
    cache: ReferenceCache | None = None

    @abstractmethod
    def entry(self, part: Part) -> tuple[tuple[Tensor, ...], str]:
        """Return what the kind keeps of P_ref at the compared positions of a part, and its precision."""

    def divergence(self, model: nn.Module, part: Part) -> Tensor:
        """Return the sum of KL(P_ref || P_model) over the compared positions of a part."""
        entry, precision = self.entry(part)
        head = () if self.cache is None else self.cache.head
        states = (entry[0], *head) if self.kind.name == "hidden" else ()
        if len(states) == 1 and not head_is_frozen(model):
            raise ValueError(
                "The output head became trainable after its reference was cached as hidden states. Set "
                "requires_grad before building KLAlignment, which then keeps the head or logits."
            )
        output = forward_at(model, part.inputs, part.mask, states)
        if precision != output.precision:
            raise RuntimeError(
                f"The reference was computed with {precision}; the model now gives {output.precision}. Build "
                "the alignment after accelerator.prepare and any cast, or give it training's autocast_dtype."
            )
        return self.kind.divergence(entry, output.logits)


class LiveReference(Reading):
    """P_ref computed at each call."""

    def entry(self, part: Part) -> tuple[tuple[Tensor, ...], str]:
        output = self.source.outputs(part, self.autocast_dtype)
        return self.kind.keep(output), output.precision


class CachedReference(Reading):
    """P_ref as it was kept."""

    def __init__(self, live: LiveReference, cache: ReferenceCache, identity: dict[str, str]) -> None:
        super().__init__(live.source, live.kind, identity, live.autocast_dtype, cache)

    def entry(self, part: Part) -> tuple[tuple[Tensor, ...], str]:
        assert self.cache is not None
        # A copy, also on the CPU: where memory is mapped or cut it may be aligned in another way than where
        # it was computed, and kernels may then add in another order.
        entry = tuple(tensor[part.tokens].clone() for tensor in self.cache.entries[part.batch])
        return entry, self.cache.precision


def read_references(
    options: Reference,
    model: nn.Module,
    source: ReferenceSource,
    sources: Sequence[SourceBatches],
    parts: Callable[[SourceBatches], Iterator[Part]],
    share: Share,
    autocast_dtype: torch.dtype | None,
) -> dict[SourceBatches, Reading]:
    """Return the way to P_ref on the `parts` of each source of rows that this rank computes.

    What is kept is read from its file if there is one, else it is computed now.
    """
    tokens = sum(rows.tokens(index) for rows in sources for index in range(len(rows.batches)))
    kind = choose_kind(options, model, source, -(-tokens // share.size))
    weights = fingerprint(source.named_parameters())
    readings: dict[SourceBatches, Reading] = {}
    for number, rows in enumerate(sources):
        identity = {
            "batches": rows.digest,
            "precision": f"{kind.label}, autocast {autocast_dtype}",
            **weights,
        }
        live = LiveReference(source, kind, identity, autocast_dtype)
        path = None if options.file is None else _file_of_source(Path(options.file), number)
        kept = options.cache is not None
        readings[rows] = _kept(live, path, options.resumed and source.drifts, parts(rows)) if kept else live
    return readings


def _file_of_source(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}") if number else path


def _kept(live: LiveReference, path: Path | None, drifted: bool, parts: Iterator[Part]) -> CachedReference:
    if path is not None and path.exists():
        return CachedReference(live, *ReferenceCache.load(path, live.identity, check_weights=not drifted))
    if drifted:
        raise ValueError(
            "The model has been fine-tuned (resumed=True), so its reference cannot be computed from it, and "
            f"the cache file is {f'missing: {path}' if path else 'not given'}. Give Reference(file=...) of "
            "the original run, or the aligned model as Reference(ref_model=...)."
        )
    cache = _computed(live, parts)
    if path is not None:
        cache.save(path, live.identity)
    return CachedReference(live, cache, live.identity)


def _computed(live: LiveReference, parts: Iterator[Part]) -> ReferenceCache:
    batches: dict[int, list[tuple[Tensor, ...]]] = {}
    for part in parts:
        entry, precision = live.entry(part)
        kept = batches.setdefault(part.batch, [])
        # What is run to keep pace with other ranks is kept only where there is nothing else.
        if part.weight or not kept:
            kept.append(tuple(tensor.cpu() for tensor in entry))
    entries = [tuple(map(torch.cat, zip(*kept, strict=True))) for kept in batches.values()]
    with live.source.open() as model:
        weights = head_weights(model) if live.kind.keeps_head else ()
        head = tuple(tensor.detach().to("cpu", copy=True) for tensor in weights)
    return ReferenceCache(entries, live.kind.name, precision, head)
