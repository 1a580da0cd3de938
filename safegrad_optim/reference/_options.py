"""Reference: where P_ref comes from and where it is kept, as the user says it."""

from dataclasses import dataclass
from os import PathLike
from typing import Literal, get_args

from torch import nn

Cache = Literal["exact", "hidden", "logits", "top_k"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where P_ref comes from, and where it is kept.

    By default it is the model with its PEFT adapters switched off, or, without adapters, the model as it is
    when the alignment is built; computed once and kept exactly, on the CPU.

    Args:
        ref_model: a frozen aligned model instead.
        cache: what is kept of each compared token. "hidden", the final hidden state, is exact, and keeps a
            copy of the output head where that is trained; "logits" is exact; "exact" is the smaller of the
            two. "top_k" keeps `top_k` log-probabilities and the mass of all other tokens, see
            `top_k_kl_divergence`. `None` keeps nothing and computes P_ref anew at each call.
        top_k: number of log-probabilities that "top_k" keeps.
        file: safetensors file to keep the cache in; read if it exists and fits, by memory map.
        resumed: the model has been fine-tuned already, so it may differ from its reference. Without adapters
            this needs the `file` of the run that is resumed, or `ref_model`.

    Raises:
        ValueError: `cache` is unknown, or is `None` with a `file`.
    """

    ref_model: nn.Module | None = None
    cache: Cache | None = "exact"
    top_k: int = 128
    file: str | PathLike[str] | None = None
    resumed: bool = False

    def __post_init__(self) -> None:
        if self.cache not in (None, *get_args(Cache)):
            raise ValueError(f"cache is {self.cache!r}, expected one of {get_args(Cache)} or None.")
        if self.cache is None and self.file is not None:
            raise ValueError("file is given but cache=None keeps nothing. Leave out one of them.")
