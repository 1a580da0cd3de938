"""What is kept of P_ref at each compared token: hidden states, logits, or the likeliest tokens."""

import os
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from safegrad_optim.divergence import kl_divergence
from safegrad_optim.forward import FinalStates, Outputs, output_head
from safegrad_optim.parallel import is_distributed_tensor, on_any_rank
from safegrad_optim.reference._options import Cache
from safegrad_optim.reference._source import ReferenceSource
from safegrad_optim.reference._top_k import TopK, top_k_kl_divergence, top_k_log_probs

_MEMORY = Path("/proc/meminfo")


class Kind(Protocol):
    """One way to keep P_ref."""

    name: str
    label: str
    """By which a cache of another kind is told from this one."""
    keeps_head: bool
    """Whether a copy of the output head is kept as well."""

    def keep(self, output: Outputs) -> tuple[Tensor, ...]:
        """Return what is kept of the reference's outputs, a row for each token."""
        ...

    def states(
        self, model: nn.Module, entry: tuple[Tensor, ...], head: tuple[Tensor, ...]
    ) -> FinalStates | None:
        """Return what has to go through the head together with the model's own states."""
        ...

    def divergence(self, entry: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Return the sum of KL(P_ref || P_model) over the tokens of an entry."""
        ...


class Logits:
    """Logits, (tokens, vocabulary), in the dtype the model gave them: exact."""

    name = label = "logits"
    keeps_head = False

    def keep(self, output: Outputs) -> tuple[Tensor, ...]:
        return (output.logits,)

    def states(self, model: nn.Module, entry: tuple[Tensor, ...], head: tuple[Tensor, ...]) -> None:
        return None

    def divergence(self, entry: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return kl_divergence(entry[0].to(logits.device), logits)


class Hidden:
    """Final hidden states, (tokens, hidden size): exact where the head is frozen, or kept as well."""

    name = "hidden"

    def __init__(self, *, keeps_head: bool) -> None:
        self.keeps_head = keeps_head
        self.label = "hidden and head" if keeps_head else "hidden"

    def keep(self, output: Outputs) -> tuple[Tensor, ...]:
        return (output.hidden,)

    def states(self, model: nn.Module, entry: tuple[Tensor, ...], head: tuple[Tensor, ...]) -> FinalStates:
        if not head and not _head_is_frozen(model):
            raise ValueError(
                "The output head became trainable after its reference was cached as hidden states. "
                "Set requires_grad before building KLAlignment, which then keeps the head or logits."
            )
        return FinalStates(entry[0], head)

    def divergence(self, entry: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        own, ref_logits = logits.chunk(2)
        return kl_divergence(ref_logits.detach(), own)


class LikeliestTokens:
    """The k likeliest tokens and the mass of all others, see `top_k_kl_divergence`."""

    name = "top_k"
    keeps_head = False

    def __init__(self, k: int) -> None:
        self.k = k
        self.label = f"top_k {k}"

    def keep(self, output: Outputs) -> tuple[Tensor, ...]:
        return top_k_log_probs(output.logits, self.k)

    def states(self, model: nn.Module, entry: tuple[Tensor, ...], head: tuple[Tensor, ...]) -> None:
        return None

    def divergence(self, entry: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return top_k_kl_divergence(TopK(*(tensor.to(logits.device) for tensor in entry)), logits)


def choose_kind(asked: Cache, model: nn.Module, source: ReferenceSource, *, tokens: int, top_k: int) -> Kind:
    """Choose what is kept of `tokens` compared tokens; it has to fit the memory that is free.

    Raises:
        ValueError: what is asked for would not give the reference's logits back.
        MemoryError: it would take more memory than is free, here or on another rank.
    """
    head = output_head(model)
    element = next(head.parameters()).element_size()
    frozen = source.shares_head and _head_is_frozen(model)
    copied = head_weights(model) if source.shares_head and not frozen else ()
    if asked == "hidden" and not (frozen or copied):
        raise ValueError(
            "cache is 'hidden', but the output head belongs to a second model, or is trained and no plain "
            "nn.Linear without hooks and shards, of which a copy could be kept: hidden states would not give "
            "the reference's logits back. Use 'logits' or 'top_k'."
        )
    logits_size = tokens * getattr(head, "out_features", 0) * element
    hidden_size = tokens * getattr(head, "in_features", 0) * element + sum(weight.nbytes for weight in copied)
    if asked == "top_k":
        _require_memory(tokens * (8 * top_k + 4))
        return LikeliestTokens(top_k)
    if asked == "hidden" or (asked == "exact" and (frozen or (copied and hidden_size < logits_size))):
        _require_memory(hidden_size)
        return Hidden(keeps_head=not frozen)
    _require_memory(logits_size)
    return Logits()


def _require_memory(size: int) -> None:
    free = _free_memory()
    # Ranks on one machine keep their parts beside one another.
    needed = size * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_any_rank(free is not None and needed > free):
        raise MemoryError(
            f"The reference takes {needed / 2**30:.1f} GiB, and {(free or 0) / 2**30:.1f} GiB are free. Give "
            "fewer or shorter safety rows; Reference(cache='top_k'), which is smaller and not exact; or, "
            "with adapters or a ref_model, Reference(cache=None), which computes it at each call."
        )


def _free_memory() -> int | None:
    """Bytes that this machine can give without swapping, `None` where it does not say."""
    if not _MEMORY.exists():
        return None
    line = next(line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _head_is_frozen(model: nn.Module) -> bool:
    return not any(tensor.requires_grad for tensor in output_head(model).parameters())


def head_weights(model: nn.Module) -> tuple[Tensor, ...]:
    """Weight and, where there is one, bias of an output head that is no more than these; else none."""
    head = output_head(model)
    # A subclass, a hook, or a forward put in place of its own may do something else with the weights.
    if type(head) is not nn.Linear or "forward" in vars(head):
        return ()
    if head._forward_hooks or head._forward_pre_hooks or is_distributed_tensor(head.weight):
        return ()
    return (head.weight,) if head.bias is None else (head.weight, head.bias)
