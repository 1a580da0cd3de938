"""KLAlignment: the alignment gradient of the paper, with its reference computed once.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
"""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim.alignment import Alignment, SafetyBatches
from safegrad_optim.distributed import mean_over_ranks, require_same, world_size
from safegrad_optim.divergence import kl_divergence
from safegrad_optim.forward import (
    Outputs,
    check_precision,
    forward_at,
    output_head,
    unchanged_evaluation,
)
from safegrad_optim.parallel import inner_module, synchronized
from safegrad_optim.reference import AdaptersOff, CurrentModel, FrozenModel, is_peft_model
from safegrad_optim.reference_cache import Kind, ReferenceCache, fingerprint
from safegrad_optim.safety_batches import Batch, Positions

__all__ = ["KLAlignment"]

# In nats a token. A model and its reference differ by less in bf16; an unaligned one by far more.
_MAX_START_KL = 0.05


class KLAlignment(Alignment):
    """Gradient of KL(P_ref || P_model) on safety batches, P_ref the model before fine-tuning.

    L_align = (1 / T) sum_t KL(P_ref(. | x_<t) || P_model(. | x_<t))    (Eq. 6)

    over the T response tokens of one safety batch; each call takes the next batch of a seeded order.
    Reference and model run in the same precision, in eval mode. By default the reference is computed
    once, here, and kept on the CPU: as final hidden states where the output head is frozen (exact),
    else as logits. With several ranks each keeps that of its own rows.

    Args:
        model: the model being fine-tuned, a causal language model; with PEFT adapters or without.
        safety_batches: model inputs with `labels` that are -100 outside the response: batches in a
            list or DataLoader, or rows in a list or Dataset.
        reference: a frozen aligned model. By default the model with its PEFT adapters switched off,
            or, without adapters, the model as it is now.
        cache: compute the reference once instead of at each call.
        cache_file: safetensors file to keep the cache in; read if it exists and fits.
        resumed: the model has been fine-tuned already, so it may differ from its reference. Without
            adapters this needs the `cache_file` of the run that is resumed, or `reference`.
        positions: "response" compares response tokens only, "all" every token.
        batch_size: rows to a batch, where `safety_batches` are rows.
        micro_batch_size: rows that go through the model at a time; same gradient, less memory.
        chunk_size: tokens whose distributions are compared at a time.
        seed: seed of the order of safety batches.
        autocast_dtype: dtype of autocast during the alignment loss; set it where training uses
            autocast around the forward only.

    Raises:
        ValueError: empty or malformed safety batches, one without a response token, a reference that
            is not the aligned model, or a cache file of another reference.
        TypeError: the model has no output head.
        NotImplementedError: an encoder-decoder; a model that is parallel in a way that is not supported;
            `cache_file` with several ranks.

    Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
    """

    def __init__(
        self,
        model: nn.Module,
        safety_batches: SafetyBatches,
        *,
        reference: nn.Module | None = None,
        cache: bool = True,
        cache_file: str | PathLike[str] | None = None,
        resumed: bool = False,
        positions: Positions = "response",
        batch_size: int = 8,
        micro_batch_size: int | None = None,
        chunk_size: int = 256,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if positions not in ("response", "all"):
            raise ValueError(f"positions is {positions!r}, expected 'response' or 'all'.")
        super().__init__(
            model,
            safety_batches,
            positions=positions,
            batch_size=batch_size,
            seed=seed,
            autocast_dtype=autocast_dtype,
        )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}, expected >= 1 or None.")
        if cache_file is not None and world_size() > 1:
            raise NotImplementedError(
                f"cache_file is given and there are {world_size()} ranks, each with a part of the reference. "
                "Leave it out; to resume, build KLAlignment from the aligned model before loading weights."
            )
        require_same(
            {"micro_batch_size": micro_batch_size, "cache": cache, "resumed": resumed},
            "Give all ranks the same options.",
        )
        self.micro_batch_size = micro_batch_size
        self.chunk_size = chunk_size
        model = self.model
        self._reference = _reference(model, None if reference is None else inner_module(reference))
        self._kind: Kind = "logits"
        if not isinstance(self._reference, FrozenModel) and self._head_is_frozen():
            self._kind = "hidden"
        # Before training changes the model that may be the reference.
        self._identity = fingerprint(
            self._reference.named_parameters(),
            self.batches,
            positions=positions,
            kind=self._kind,
            autocast_dtype=autocast_dtype,
        )
        self._cache: ReferenceCache | None = None
        if cache:
            self._cache = self._cached(None if cache_file is None else Path(cache_file), resumed)
        elif cache_file is not None:
            raise ValueError("cache_file is given but cache=False. Leave out one of them.")
        elif isinstance(self._reference, CurrentModel):
            raise ValueError(
                "Without PEFT adapters the reference has to be cached before training changes the model, "
                "but cache=False. Leave it True, or give a frozen copy of the model as reference=."
            )
        if not resumed:
            self._check_start()

    @property
    def cache(self) -> ReferenceCache | None:
        """The cached reference, `None` where it is computed at each call."""
        return self._cache

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order of safety batches and the fingerprint of the reference's weights."""
        return {**super().state_dict(), "reference": self._reference_number()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the safety batch that would have been next when `state` was saved.

        Raises:
            ValueError: the state is of a run with another reference, number of safety batches or seed.
        """
        if state["reference"] != self._reference_number():
            raise ValueError(
                f"The saved run kept to a reference with weights {state['reference']:x}, this one has "
                f"{self._reference_number():x}: the model was fine-tuned before KLAlignment was built "
                "from it, or is another one. Build it from the aligned model before loading fine-tuned "
                "weights; or give the cache_file of the saved run with resumed=True, or reference=."
            )
        super().load_state_dict(state)

    def _reference_number(self) -> int:
        # A number, because torch.distributed.checkpoint takes no other state of an optimizer.
        return int(self._identity.weights[:15], 16)

    def _cached(self, path: Path | None, resumed: bool) -> ReferenceCache:
        drifted = resumed and isinstance(self._reference, CurrentModel)
        if drifted and (path is None or not path.exists()):
            raise ValueError(
                f"The model has been fine-tuned (resumed=True), so its reference cannot be computed from "
                f"it, and the cache file is {'missing: ' + str(path) if path else 'not given'}. Give the "
                "cache_file of the original run, or the aligned model as reference=."
            )
        if path is not None and path.exists():
            saved, self._identity = ReferenceCache.load(path, self._identity, check_weights=not drifted)
            return saved
        computed = self._compute()
        if path is not None:
            computed.save(path, self._identity)
        return computed

    @torch.no_grad()
    def _compute(self) -> ReferenceCache:
        entries = []
        for index in range(len(self.batches)):
            outputs: list[Tensor] = []
            for part in self._parts(index, self.micro_batch_size):
                output = self._run_reference(part.inputs, part.mask)
                if part.weight or not outputs:
                    outputs.append((output.hidden if self._kind == "hidden" else output.logits).cpu())
            entries.append(torch.cat(outputs))
        return ReferenceCache(entries, self._kind, output.precision)

    @torch.no_grad()
    def _run_reference(self, inputs: Batch, mask: Tensor) -> Outputs:
        with (
            self._reference.open() as model,
            synchronized(model),
            unchanged_evaluation(model),
            self._autocast(model),
        ):
            device = next(model.parameters()).device
            inputs = {name: value.to(device) for name, value in inputs.items()}
            return forward_at(model, inputs, mask.to(device))

    def _losses(self, index: int) -> Iterator[Tensor]:
        tokens = self._mean_tokens(index)
        done = 0
        for part in self._parts(index, self.micro_batch_size):
            count = int(part.mask.sum())
            start = done if part.weight else 0
            logits, ref_logits = self._pair(index, start, count, part.inputs, part.mask)
            yield kl_divergence(ref_logits, logits, chunk_size=self.chunk_size) * part.weight / tokens
            done = start + count

    def _pair(self, index: int, start: int, count: int, inputs: Batch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the model and of the reference at `count` compared positions from `start` on."""
        if self._cache is None:
            reference = self._run_reference(inputs, mask)
            output = forward_at(self.model, inputs, mask)
            check_precision(reference.precision, output.precision)
            return output.logits, reference.logits.to(output.logits.device)
        entry = self._cache.entries[index][start : start + count]
        if self._cache.kind == "hidden":
            if not self._head_is_frozen():
                raise ValueError(
                    "The output head became trainable after its reference was cached as hidden states. "
                    "Set requires_grad before building KLAlignment, which then caches logits."
                )
            both = forward_at(self.model, inputs, mask, ref_hidden=entry)
            check_precision(self._cache.precision, both.precision)
            return both.logits[:count], both.logits[count:].detach()
        output = forward_at(self.model, inputs, mask)
        check_precision(self._cache.precision, output.precision)
        return output.logits, entry.to(output.logits.device)

    def _head_is_frozen(self) -> bool:
        return not any(tensor.requires_grad for tensor in output_head(self.model).parameters())

    @torch.no_grad()
    def _check_start(self) -> None:
        """Refuse a reference from which the model differs before any fine-tuning."""
        with synchronized(self.model), unchanged_evaluation(self.model), self._autocast(self.model):
            total = sum(self._losses(0), torch.zeros((), device=self._device()))
        if self._share.size > 1:
            total, _ = mean_over_ranks(total)
        divergence = float(total)
        if not divergence <= _MAX_START_KL:
            raise ValueError(
                f"Before fine-tuning the model already differs from its reference by KL = "
                f"{divergence:.3g} a token, expected less than {_MAX_START_KL}. If its adapters hold the "
                "alignment, merge them first (merge_and_unload) and add new ones; if reference= is "
                "another model, give the aligned one; if the run is resumed, pass resumed=True."
            )


def _reference(model: nn.Module, reference: nn.Module | None) -> AdaptersOff | FrozenModel | CurrentModel:
    if reference is not None:
        return FrozenModel(reference, model)
    return AdaptersOff(model) if is_peft_model(model) else CurrentModel(model)
