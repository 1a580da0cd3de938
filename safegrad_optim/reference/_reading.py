"""What is kept of P_ref at each compared token, if anything, and how it is read."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim._torch_private import has_forward_hooks
from safegrad_optim.batches import Part, SafetySource
from safegrad_optim.divergence import TopK, kl_divergence, top_k_kl_divergence, top_k_log_probs
from safegrad_optim.forward import Outputs, forward_at, output_head
from safegrad_optim.parallel import Share, is_distributed_tensor, on_any_rank
from safegrad_optim.reference._cache import ReferenceCache, fingerprint
from safegrad_optim.reference._source import Reference, ReferenceSource

_MEMORY = Path("/proc/meminfo")


class Kind(NamedTuple):
    """One way to keep P_ref: "hidden", "logits" or "top_k", and whether with its output head."""

    name: str
    keeps_head: bool = False
    top_k: int = 0

    def keep(self, output: Outputs) -> tuple[Tensor, ...]:
        """Return what is kept of the reference's outputs, a row for each token."""
        if self.name == "top_k":
            return top_k_log_probs(output.logits, self.top_k)
        return (output.hidden if self.name == "hidden" else output.logits,)

    def divergence(self, entry: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Return the sum of KL(P_ref || P_model); of hidden states, those of the reference came last."""
        if self.name == "hidden":
            own, ref_logits = logits.chunk(2)
            return kl_divergence(ref_logits.detach(), own)
        first, *others = (tensor.to(logits.device) for tensor in entry)
        return top_k_kl_divergence(TopK(first, *others), logits) if others else kl_divergence(first, logits)


class Reading:
    """P_ref on the safety batches of a source, computed at each call until it is kept."""

    cache: ReferenceCache | None = None

    def __init__(
        self,
        options: Reference,
        model: nn.Module,
        source: ReferenceSource,
        rows: SafetySource,
        share: Share,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.source = source
        self.autocast_dtype = autocast_dtype
        tokens = sum(map(rows.tokens, range(len(rows.batches))))
        self.kind = _choose_kind(options, model, source, -(-tokens // share.size))
        name, keeps_head, top_k = self.kind
        label = f"{name}{' and head' * keeps_head}{f' {top_k}' if top_k else ''}, autocast {autocast_dtype}"
        self.identity = fingerprint(source.named_parameters(), rows.digest, label)

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
        if len(states) == 1 and not _head_is_frozen(model):
            raise ValueError(
                "The output head became trainable after its reference was cached as hidden states. Set "
                "requires_grad before building KLAlignment, which then keeps the head or logits."
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
            weights = _head_weights(model) if self.kind.keeps_head else ()
            head = tuple(tensor.detach().to("cpu", copy=True) for tensor in weights)
        return ReferenceCache(entries, self.kind.name, output.precision, head)


def _choose_kind(options: Reference, model: nn.Module, source: ReferenceSource, tokens: int) -> Kind:
    """Choose what is kept of so many compared tokens, or else computed at each call."""
    asked = options.cache
    if asked is None:
        if source.drifts:
            raise ValueError(
                "Without PEFT adapters the reference has to be kept before training changes the model, but "
                "cache=None. Leave it out, or give a frozen copy of the model as Reference(ref_model=...)."
            )
        return Kind("logits")
    head = output_head(model)
    frozen = source.shares_head and _head_is_frozen(model)
    copied = _head_weights(model) if source.shares_head and not frozen else ()
    if asked == "hidden" and not (frozen or copied):
        raise ValueError(
            "cache is 'hidden', but the output head belongs to a second model, or is trained and no plain "
            "nn.Linear without hooks and shards, of which a copy could be kept. Use 'logits' or 'top_k'."
        )
    values = tokens * next(head.parameters()).element_size()
    sizes = {
        "hidden": values * getattr(head, "in_features", 0) + sum(weight.nbytes for weight in copied),
        "logits": values * getattr(head, "out_features", 0),
        "top_k": tokens * (8 * options.top_k + 4),
    }
    if asked == "exact":
        smaller = bool(copied) and sizes["hidden"] < sizes["logits"]
        asked = "hidden" if frozen or smaller else "logits"
    _require_memory(sizes[asked])
    return Kind(asked, asked == "hidden" and not frozen, options.top_k if asked == "top_k" else 0)


def _head_is_frozen(model: nn.Module) -> bool:
    """Whether nothing in the output head is trained."""
    return not any(tensor.requires_grad for tensor in output_head(model).parameters())


def _head_weights(model: nn.Module) -> tuple[Tensor, ...]:
    """Weight and, where there is one, bias of an output head that is no more than these; else none."""
    head = output_head(model)
    # A subclass, a hook, or a forward put in place of its own may do something else with the weights.
    if type(head) is not nn.Linear or "forward" in vars(head) or has_forward_hooks(head):
        return ()
    return () if is_distributed_tensor(head.weight) else tuple(head.parameters())


def _require_memory(size: int) -> None:
    available = re.search(r"MemAvailable:\s*(\d+)", _MEMORY.read_text()) if _MEMORY.exists() else None
    free = int(available[1]) * 1024 if available else math.inf
    # Ranks on one machine keep their parts beside one another.
    needed = size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_any_rank(needed > free):
        raise MemoryError(
            f"The reference takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. Give fewer "
            "or shorter rows; Reference(cache='top_k'), which is not exact; or, with adapters or ref_model, "
            "Reference(cache=None), which computes it at each call."
        )
