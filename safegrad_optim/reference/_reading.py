"""How P_ref is read: computed at each call, or from what was kept of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from safegrad_optim.batches import Part, SourceBatches
from safegrad_optim.forward import forward_at, output_head, sent
from safegrad_optim.parallel import Share
from safegrad_optim.reference._cache import ReferenceCache, fingerprint
from safegrad_optim.reference._kind import Kind, choose_kind, head_is_frozen, head_weights
from safegrad_optim.reference._source import Reference, ReferenceSource
from safegrad_optim.reference._trained import require_untrained
from safegrad_optim.reference._watch import Watch


@dataclass
class Reading(ABC):
    """A way to P_ref on safety batches."""

    source: ReferenceSource
    kind: Kind
    autocast_dtype: torch.dtype | None
    caches: Mapping[SourceBatches, ReferenceCache] = field(default_factory=dict)
    watch: Watch | None = None  # of the weights that are read at each call
    heads: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)  # where they were needed

    @abstractmethod
    def entry(self, part: Part) -> tuple[tuple[Tensor, ...], str]:
        """Return what the kind keeps of P_ref at the compared positions of a part, and its precision."""

    def divergences(self, model: nn.Module, part: Part, *, of_each_token: bool = False) -> list[Tensor]:
        """Return the sum of KL(P_ref || P_model) over the tokens of each section of a part, or at each."""
        entry, precision = self.entry(part)
        states = (entry[0], *self._head(model)) if self.kind.name == "hidden" else ()
        if self.watch is not None:
            self.watch.check()
        if len(states) == 1 and not head_is_frozen(model):
            raise ValueError(
                "The output head became trainable after its reference was cached as hidden states. If it is "
                "thawed in the course of a run, give Reference(cache='logits'), which needs no frozen head; "
                "else set requires_grad before building KLAlignment."
            )
        output = forward_at(model, part.inputs, part.mask, states)
        if precision != output.precision:
            raise RuntimeError(
                f"The reference was computed with {precision}; the model now gives {output.precision}. Build "
                "the alignment after accelerator.prepare and any cast, or give it training's autocast_dtype."
            )
        counts = [section.length for section in part.sections]
        return self.kind.divergences(entry, output.logits, [1] * sum(counts) if of_each_token else counts)

    def _head(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Weight and bias of the reference's head, if they are kept, on the device of the model's."""
        kept = next(iter(self.caches.values())).head if self.caches else ()
        device = next(output_head(model).parameters()).device
        if device not in self.heads:
            self.heads[device] = tuple(sent(tensor, device) for tensor in kept)
        return self.heads[device]


class LiveReference(Reading):
    """P_ref computed at each call."""

    def entry(self, part: Part) -> tuple[tuple[Tensor, ...], str]:
        output = self.source.outputs(part, self.autocast_dtype)
        return self.kind.keep(output), output.precision


class CachedReference(Reading):
    """P_ref as it was kept."""

    def entry(self, part: Part) -> tuple[tuple[Tensor, ...], str]:
        entries = [
            tuple(tensor[tokens] for tensor in self.caches[source].entries[batch])
            for source, batch, tokens, _ in part.sections
        ]
        # A copy, also on the CPU: where memory is mapped or cut it may be aligned in another way than where
        # it was computed, and kernels may then add in another order.
        entry = tuple(torch.cat(tensors) for tensors in zip(*entries, strict=True))
        return entry, self.caches[part.sections[0].source].precision


def read_references(
    options: Reference,
    model: nn.Module,
    source: ReferenceSource,
    sources: Sequence[SourceBatches],
    parts: Callable[[SourceBatches], Iterator[Part]],
    share: Share,
    autocast_dtype: torch.dtype | None,
) -> tuple[Reading, str]:
    """Return the way to P_ref on the `parts` of each source that this rank computes, and P_ref's weights.

    What is kept is read from its file if there is one, else it is computed now.
    """
    tokens = sum(rows.tokens(index) for rows in sources for index in range(len(rows.batches)))
    kind = choose_kind(options, model, source, -(-tokens // share.size))
    live = LiveReference(source, kind, autocast_dtype)
    own = fingerprint(source.named_parameters())
    if options.ref_model is None and not (options.resumed or options.trained_here):
        require_untrained(source.named_parameters(), own["weights"])
    if options.cache is None:
        live.watch = Watch("The reference", source.named_parameters)
        return live, own["weights"]
    own["precision"] = f"{kind.label}, autocast {autocast_dtype}"
    caches: dict[SourceBatches, ReferenceCache] = {}
    weights = ""
    for number, rows in enumerate(sources):
        path = None if options.file is None else _file_of_source(Path(options.file), number)
        identity = {"batches": rows.digest, **own}
        caches[rows], found = _kept(live, path, identity, options.resumed and source.drifts, parts(rows))
        # One copy of the head is enough.
        caches[rows].head = caches[sources[0]].head
        if number and found != weights:
            raise ValueError(
                f"{path} is of a reference with other weights than the file of the first source. Give the "
                "files of one run, or delete them to compute the reference anew."
            )
        weights = found
    watch = None
    if kind.name == "hidden" and not kind.keeps_head:
        watch = Watch("The output head", partial(_head_parameters, model))
    return CachedReference(source, kind, autocast_dtype, caches, watch), weights


def _head_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return output_head(model).named_parameters()


def _file_of_source(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}") if number else path


def _kept(
    live: LiveReference, path: Path | None, identity: dict[str, str], drifted: bool, parts: Iterator[Part]
) -> tuple[ReferenceCache, str]:
    """Return what is kept of one source, and which weights it is of."""
    if path is not None and path.exists():
        cache, found = ReferenceCache.load(path, identity, check_weights=not drifted)
        return cache, found["weights"]
    if drifted:
        raise ValueError(
            "The model has been fine-tuned (resumed=True), so its reference cannot be computed from it, and "
            f"the cache file is {f'missing: {path}' if path else 'not given'}. Give Reference(file=...) of "
            "the original run, or the aligned model as Reference(ref_model=...)."
        )
    cache = _computed(live, parts)
    if path is not None:
        cache.save(path, identity)
    return cache, identity["weights"]


def _computed(live: LiveReference, parts: Iterator[Part]) -> ReferenceCache:
    batches: dict[int, list[tuple[Tensor, ...]]] = {}
    for part in parts:
        entry, precision = live.entry(part)
        (section,) = part.sections
        kept = batches.setdefault(section.batch, [])
        # What is run to keep pace with other ranks is kept only where there is nothing else.
        if section.weight or not kept:
            kept.append(tuple(tensor.cpu() for tensor in entry))
    entries = [tuple(map(torch.cat, zip(*kept, strict=True))) for kept in batches.values()]
    with live.source.open() as model:
        weights = head_weights(model) if live.kind.keeps_head else ()
        head = tuple(tensor.detach().to("cpu", copy=True) for tensor in weights)
    return ReferenceCache(entries, live.kind.name, precision, head)
