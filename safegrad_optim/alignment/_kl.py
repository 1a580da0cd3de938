"""KLAlignment: the alignment gradient of the paper, with its reference computed once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim.alignment._base import Alignment
from safegrad_optim.alignment._old_arguments import naming_the_new
from safegrad_optim.alignment._start import check_start
from safegrad_optim.batches import (
    Part,
    Positions,
    SafetyBatches,
    SafetySource,
    Section,
    SourceBatches,
    joined,
)
from safegrad_optim.forward import require_inputs
from safegrad_optim.parallel import inner_module, on_any_rank, require_same, world_size
from safegrad_optim.progress import shown
from safegrad_optim.reference import (
    Reference,
    ReferenceCache,
    marks_of,
    read_references,
    reference_source,
    remember,
)

# So many are run in less time than it takes to read of it.
_FEW_BATCHES = 32


class KLAlignment(Alignment):
    """Gradient of KL(P_ref || P_model) on safety batches, P_ref the model before fine-tuning.

    L_align = (1 / T) sum_t KL(P_ref(. | x_<t) || P_model(. | x_<t))    (Eq. 6)

    over the T response tokens of one safety batch; each call takes the next batch of a seeded order.
    Reference and model run as in training, but with dropout and its kin off, also where the user's passes are
    in eval mode; with several ranks each keeps the reference of its own rows.

    Args:
        model: the causal language model being fine-tuned, with PEFT adapters or without.
        safety_batches: model inputs with `labels` that are -100 outside the response: batches in a list or
            DataLoader, or rows in a list or Dataset; or several `SafetySource`, as from `safety_sources`.
        reference: where P_ref comes from and where it is kept; by default computed from `model`, here.
        positions: "response" compares response tokens only, "all" every token.
        batch_size: rows to a batch, where `safety_batches` are rows.
        micro_batch_size: rows that go through the model at a time; same gradient, less memory.
        seed: seed of the order of safety batches.
        autocast_dtype: of autocast during the loss, where training has it around the forward only.

    Raises:
        ValueError: empty or malformed safety batches, one without a response token, a reference that is not
            the aligned model, or a cache file of another reference.
        TypeError: the model has no output head.
        MemoryError: the reference would take more memory than is free.
        NotImplementedError: an encoder-decoder, an unsupported parallel model, or `file` with several ranks.

    Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
    """

    @naming_the_new
    def __init__(
        self,
        model: nn.Module,
        safety_batches: SafetyBatches | Iterable[SafetySource],
        *,
        reference: Reference | None = None,
        positions: Positions = "response",
        batch_size: int = 8,
        micro_batch_size: int | None = None,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        sources = _sources(safety_batches, positions, batch_size)
        super().__init__(
            model,
            [SourceBatches(source, seed + number) for number, source in enumerate(sources)],
            autocast_dtype,
        )
        for source in self._sources:
            require_inputs(self.model, source.batches[0])
        options = Reference() if reference is None else reference
        self.micro_batch_size = micro_batch_size
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}, expected >= 1 or None.")
        if options.file is not None and world_size() > 1:
            raise NotImplementedError(
                f"file is given and there are {world_size()} ranks, each with a part of the reference. Leave "
                "it out; to resume, build KLAlignment from the aligned model before loading weights."
            )
        own = {name: getattr(options, name) for name in ("cache", "top_k", "resumed")}
        require_same(own | {"micro_batch_size": micro_batch_size}, "Give all ranks the same options.")
        ref_model = None if options.ref_model is None else inner_module(options.ref_model)
        origin = reference_source(self.model, ref_model)
        self._reading, self._reference_weights = read_references(
            options, self.model, origin, self._sources, self._announced_parts, self._share, autocast_dtype
        )
        self._origin = origin
        self._start: list[tuple[int, int]] | None = None
        if not options.resumed:
            self._check_start()
            self._start = marks_of(origin.named_parameters())

    def _check_before_call(self) -> None:
        super()._check_before_call()
        if self._start is not None:
            # Aligned weights that were loaded after the reference was computed, for example.
            if on_any_rank(marks_of(self._origin.named_parameters()) != self._start):
                self._check_start()
            self._start = None
            remember(self.model.named_parameters(), self._reference_weights)

    @property
    def cache(self) -> ReferenceCache | None:
        """The kept reference of the first source, `None` where it is computed at each call."""
        return self._reading.caches.get(self._sources[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order of safety batches and the fingerprint of the reference's weights."""
        return {**super().state_dict(), "reference": self._reference_number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch that was next when `state` was saved, with the same reference and order."""
        if "reference" not in state:
            raise ValueError(
                "The saved run had an alignment without a reference. Resume with its kind, or start anew."
            )
        if state["reference"] != self._reference_number:
            raise ValueError(
                f"The saved run kept to a reference with weights {state['reference']:x}, this one has "
                f"{self._reference_number:x}: the model was fine-tuned before KLAlignment was built, or is "
                "another. Build it from the aligned model before loading fine-tuned weights, or give "
                "Reference(ref_model=...), or the file of the saved run, Reference(file=..., resumed=True)."
            )
        super().load_state_dict(state)
        self._start = None

    @property
    def _reference_number(self) -> int:
        # A number, because torch.distributed.checkpoint takes no other state of an optimizer.
        return int(self._reference_weights[:15], 16)

    def _announced_parts(self, source: SourceBatches) -> Iterator[Part]:
        many = len(source.batches) > _FEW_BATCHES
        return self._all_parts(source, "Reference of safety batches" if many else None)

    def _all_parts(self, source: SourceBatches, progress: str | None = None) -> Iterator[Part]:
        indices = shown(range(len(source.batches)), progress)
        return chain.from_iterable(self._parts(source, index, self.micro_batch_size) for index in indices)

    def _losses(self, indices: Sequence[int]) -> Iterator[Tensor]:
        chosen = zip(self._sources, indices, strict=True)
        parts: Sequence[Part] = [
            part for source, index in chosen for part in self._parts(source, index, self.micro_batch_size)
        ]
        # In few passes: one of few rows takes as long as one of many.
        for part in joined(parts) if self.micro_batch_size is None else parts:
            divergences = self._reading.divergences(self.model, part)
            weighted = [
                divergence * (section.weight * section.source.weight / self._tokens(section))
                for divergence, section in zip(divergences, part.sections, strict=True)
            ]
            yield torch.stack(weighted).sum()

    def _tokens(self, section: Section) -> float:
        """Compared tokens of a batch, in the mean over ranks, whose losses are averaged."""
        return section.source.tokens(section.batch) / self._share.size

    def _check_start(self) -> None:
        # Part by part as the reference was computed, so that what is the same has the same bits.
        parts = chain.from_iterable(self._all_parts(source) for source in self._sources)
        check_start(self.model, self._reading, parts, self.autocast_dtype)


def _sources(
    given: SafetyBatches | Iterable[SafetySource], positions: Positions, batch_size: int
) -> Sequence[SafetySource]:
    """The sources as they were given, or one of plain safety batches."""
    if isinstance(given, (SafetySource, Mapping)):
        given = [given]
    # Not read to its end here: a loader may write each batch over the one before.
    reading = iter(given)
    start: list[Any] = [*islice(reading, 1)]
    if not any(isinstance(item, SafetySource) for item in start):
        rows: Any = given if hasattr(given, "__getitem__") else chain(start, reading)
        return [SafetySource(rows=rows, positions=positions, batch_size=batch_size)]
    items = [*start, *reading]
    sources = [item for item in items if isinstance(item, SafetySource)]
    others = [type(item).__name__ for item in items if not isinstance(item, SafetySource)]
    if others:
        raise TypeError(f"A {others[0]} stands among SafetySource. Give its rows a source too.")
    if (positions, batch_size) != ("response", 8):
        raise ValueError("positions and batch_size are those of each SafetySource. Give them there.")
    return sources
