"""KLAlignment: the alignment gradient of the paper, with its reference computed once.

Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
"""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim.alignment._base import Alignment, SafetyBatches
from safegrad_optim.batches import Batch, Positions, position_mask
from safegrad_optim.divergence import kl_divergence
from safegrad_optim.forward import (
    FinalStates,
    Outputs,
    check_precision,
    forward_at,
    unchanged_evaluation,
)
from safegrad_optim.parallel import inner_module, mean_over_ranks, require_same, synchronized, world_size
from safegrad_optim.reference import (
    AdaptersOff,
    CacheKind,
    CurrentModel,
    FrozenModel,
    Kind,
    ReferenceCache,
    TopK,
    choose_kind,
    fingerprint,
    head_is_frozen,
    head_weights,
    is_peft_model,
    top_k_kl_divergence,
    top_k_log_probs,
)

# In nats a token. A model and its reference differ by less in bf16; an unaligned one by far more.
_MAX_START_KL = 0.05


class KLAlignment(Alignment):
    """Gradient of KL(P_ref || P_model) on safety batches, P_ref the model before fine-tuning.

    L_align = (1 / T) sum_t KL(P_ref(. | x_<t) || P_model(. | x_<t))    (Eq. 6)

    over the T response tokens of one safety batch; each call takes the next batch of a seeded order.
    Reference and model run in the same precision, in eval mode. By default the reference is computed
    once, here, and kept on the CPU: as final hidden states, with a copy of the output head where that is
    trained, or as logits. With several ranks each keeps that of its own rows.

    Args:
        model: the model being fine-tuned, a causal language model; with PEFT adapters or without.
        safety_batches: model inputs with `labels` that are -100 outside the response: batches in a
            list or DataLoader, or rows in a list or Dataset.
        reference: a frozen aligned model. By default the model with its PEFT adapters switched off,
            or, without adapters, the model as it is now.
        cache: compute the reference once instead of at each call.
        cache_file: safetensors file to keep the cache in; read if it exists and fits, by memory map.
        cache_kind: what is kept of each compared token. "hidden", the final hidden state, is exact, and
            keeps a copy of the output head where that is trained; "logits" is exact; "top_k" keeps `top_k`
            log-probabilities and the mass of all other tokens, see `top_k_kl_divergence` for what that
            leaves out. By default "hidden" where the head is frozen, else the smaller of "hidden" and
            "logits" up to 1 GiB, else "top_k" with a warning.
        top_k: number of log-probabilities that "top_k" keeps.
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
        cache_kind: Kind | None = None,
        top_k: int = 128,
        resumed: bool = False,
        positions: Positions = "response",
        batch_size: int = 8,
        micro_batch_size: int | None = None,
        chunk_size: int = 16,
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
            {
                "micro_batch_size": micro_batch_size,
                "cache": cache,
                "cache_kind": cache_kind,
                "top_k": top_k,
                "resumed": resumed,
            },
            "Give all ranks the same options.",
        )
        self.micro_batch_size = micro_batch_size
        self.chunk_size = chunk_size
        model = self.model
        self._reference = _reference(model, None if reference is None else inner_module(reference))
        self.top_k = top_k
        self._kind = CacheKind("logits")
        if cache:
            tokens = sum(int(position_mask(batch, positions).sum()) for batch in self.batches)
            self._kind = choose_kind(cache_kind, model, self._reference, tokens=tokens, top_k=top_k)
        # Before training changes the model that may be the reference.
        self._identity = fingerprint(
            self._reference.named_parameters(),
            self.batches,
            positions=positions,
            kind=self._kind.label(top_k),
            autocast_dtype=autocast_dtype,
        )
        self._cache: ReferenceCache | None = None
        if cache:
            self._cache = self._cached(None if cache_file is None else Path(cache_file), resumed)
        elif cache_file is not None or cache_kind is not None:
            given = "cache_file" if cache_file is not None else "cache_kind"
            raise ValueError(f"{given} is given but cache=False. Leave out one of them.")
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
            outputs: list[tuple[Tensor, ...]] = []
            for part in self._parts(index, self.micro_batch_size):
                output = self._run_reference(part.inputs, part.mask)
                if part.weight or not outputs:
                    outputs.append(tuple(tensor.cpu() for tensor in self._kept(output)))
            entries.append(tuple(map(torch.cat, zip(*outputs, strict=True))))
        weights = head_weights(self.model) if self._kind.keeps_head else ()
        head = tuple(tensor.to("cpu", copy=True) for tensor in weights)
        return ReferenceCache(entries, self._kind.name, output.precision, head)

    def _kept(self, output: Outputs) -> tuple[Tensor, ...]:
        if self._kind.name == "top_k":
            return top_k_log_probs(output.logits, self.top_k)
        return (output.hidden if self._kind.name == "hidden" else output.logits,)

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
            start = done if part.weight else 0
            done = start + int(part.mask.sum())
            yield self._divergence(index, slice(start, done), part.inputs, part.mask) * part.weight / tokens

    def _divergence(self, index: int, positions: slice, inputs: Batch, mask: Tensor) -> Tensor:
        """Sum of KL over the compared positions of `mask`, which in the cache are at `positions`."""
        if self._cache is None:
            reference = self._run_reference(inputs, mask)
            output = forward_at(self.model, inputs, mask)
            check_precision(reference.precision, output.precision)
            ref_logits = reference.logits.to(output.logits.device)
            return kl_divergence(ref_logits, output.logits, chunk_size=self.chunk_size)
        # A copy, also on the CPU: where memory is mapped or cut it may be aligned in another way than where
        # it was computed, and kernels may then add in another order.
        entry = [tensor[positions].clone() for tensor in self._cache.entries[index]]
        states = None
        if self._cache.kind == "hidden":
            if not self._cache.head and not head_is_frozen(self.model):
                raise ValueError(
                    "The output head became trainable after its reference was cached as hidden states. "
                    "Set requires_grad before building KLAlignment, which then keeps the head or logits."
                )
            states = FinalStates(entry[0], self._cache.head)
        output = forward_at(self.model, inputs, mask, states)
        check_precision(self._cache.precision, output.precision)
        if states is not None:
            logits, ref_logits = output.logits.chunk(2)
            return kl_divergence(ref_logits.detach(), logits, chunk_size=self.chunk_size)
        first, *others = (tensor.to(output.logits.device) for tensor in entry)
        if self._cache.kind == "top_k":
            return top_k_kl_divergence(TopK(first, *others), output.logits, chunk_size=self.chunk_size)
        return kl_divergence(first, output.logits, chunk_size=self.chunk_size)

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
