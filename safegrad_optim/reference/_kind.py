"""What to keep of the reference: the smallest of what is exact, and less only where that is too large."""

import warnings
from typing import Literal, NamedTuple, get_args

from torch import Tensor, nn

from safegrad_optim.forward import output_head
from safegrad_optim.parallel import is_distributed_tensor
from safegrad_optim.reference._source import FrozenModel, Reference

Kind = Literal["hidden", "logits", "top_k"]
_MAX_EXACT_BYTES = 1 << 30


class CacheKind(NamedTuple):
    """What is kept of each compared token, and whether with it the output head that it goes through."""

    name: Kind
    keeps_head: bool = False

    def label(self, top_k: int) -> str:
        """By which a cache of another kind is told from this one."""
        if self.name == "top_k":
            return f"top_k {top_k}"
        return f"{self.name} and head" if self.keeps_head else self.name


def choose_kind(
    asked: Kind | None, model: nn.Module, reference: Reference, *, tokens: int, top_k: int
) -> CacheKind:
    """Choose what is kept of `tokens` compared tokens, which may be asked for.

    Raises:
        ValueError: what is asked for is unknown, or would not give the reference's logits back.
    """
    if asked not in (None, *get_args(Kind)):
        raise ValueError(f"cache_kind is {asked!r}, expected one of {get_args(Kind)} or None.")
    if asked in ("logits", "top_k"):
        return CacheKind(asked)
    of_this_head = not isinstance(reference, FrozenModel)
    if of_this_head and head_is_frozen(model):
        return CacheKind("hidden")
    weights = head_weights(model) if of_this_head else ()
    if asked == "hidden":
        if not weights:
            raise ValueError(
                "cache_kind is 'hidden', but the output head belongs to a second model, or is trained and no "
                "plain nn.Linear without hooks and shards, of which a copy could be kept: hidden states "
                "would not give the reference's logits back. Use 'logits' or 'top_k'."
            )
        return CacheKind("hidden", keeps_head=True)
    return _smallest(model, weights, tokens, top_k)


def head_is_frozen(model: nn.Module) -> bool:
    """Whether nothing in the output head is trained."""
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


def _smallest(model: nn.Module, weights: tuple[Tensor, ...], tokens: int, top_k: int) -> CacheKind:
    head = output_head(model)
    element = next(head.parameters()).element_size()
    sizes = {CacheKind("logits"): tokens * getattr(head, "out_features", 0) * element}
    if weights:
        states = tokens * weights[0].shape[1] * element
        sizes[CacheKind("hidden", keeps_head=True)] = states + sum(tensor.nbytes for tensor in weights)
    kind, size = min(sizes.items(), key=lambda item: item[1])
    if size <= _MAX_EXACT_BYTES:
        return kind
    warnings.warn(
        f"The exact reference would take {size / 2**30:.1f} GiB, so {top_k} log-probabilities a token are "
        "cached (cache_kind='top_k'), which leaves out what the model does among the other tokens. Give "
        f"cache_kind={kind.name!r} to keep all, or 'top_k' to agree.",
        stacklevel=4,
    )
    return CacheKind("top_k")
