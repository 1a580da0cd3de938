"""What is kept of P_ref at each compared token: hidden states, logits, or the likeliest tokens."""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from safegrad_optim._torch_private import has_forward_hooks
from safegrad_optim.divergence import TopK, kl_divergence, top_k_kl_divergence, top_k_log_probs
from safegrad_optim.forward import Outputs, output_head, sent
from safegrad_optim.parallel import is_distributed_tensor, on_any_rank
from safegrad_optim.reference._source import Reference, ReferenceSource

_MEMORY = Path("/proc/meminfo")


class Kind(NamedTuple):
    """One way to keep P_ref: "hidden", "logits" or "top_k", and whether with its output head."""

    name: str
    keeps_head: bool = False
    top_k: int = 0

    @property
    def label(self) -> str:
        """By which a cache of another kind is told from this one."""
        return f"{self.name}{' and head' * self.keeps_head}{f' {self.top_k}' if self.top_k else ''}"

    def keep(self, output: Outputs) -> tuple[Tensor, ...]:
        """Return what is kept of the reference's outputs, a row for each token."""
        if self.name == "top_k":
            return top_k_log_probs(output.logits, self.top_k)
        return (output.hidden if self.name == "hidden" else output.logits,)

    def divergences(self, entry: tuple[Tensor, ...], logits: Tensor, counts: list[int]) -> list[Tensor]:
        """Return sums of KL(P_ref || P_model) over so many tokens each, one after another.

        Of hidden states, the logits of the reference came last.
        """
        if self.name == "hidden":
            logits, ref_logits = logits.chunk(2)
            entry = (ref_logits.detach(),)
        kept = zip(*(sent(tensor, logits.device).split(counts) for tensor in entry), strict=True)
        pairs = zip(kept, logits.split(counts), strict=True)
        return [_divergence(ref, own) for ref, own in pairs]


def _divergence(ref: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    first, *others = ref
    return top_k_kl_divergence(TopK(first, *others), logits) if others else kl_divergence(first, logits)


def choose_kind(options: Reference, model: nn.Module, source: ReferenceSource, tokens: int) -> Kind:
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
    frozen = source.shares_head and head_is_frozen(model)
    copied = head_weights(model) if source.shares_head and not frozen else ()
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


def head_is_frozen(model: nn.Module) -> bool:
    """Whether nothing in the output head is trained."""
    return not any(tensor.requires_grad for tensor in output_head(model).parameters())


def head_weights(model: nn.Module) -> tuple[Tensor, ...]:
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
            "rows; Reference(cache='top_k'), which is not exact; or, with adapters or a ref_model, "
            "Reference(cache=None), which computes it at each call."
        )
