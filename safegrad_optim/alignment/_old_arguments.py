"""Arguments that KLAlignment had before `Reference`, each refused with the name of the new one."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from torch import nn

P = ParamSpec("P")

_NEW = {
    "cache": "reference=Reference(cache=None) for cache=False",
    "cache_file": "reference=Reference(file=...)",
    "cache_kind": "reference=Reference(cache=...)",
    "top_k": "reference=Reference(cache='top_k', top_k=...)",
    "resumed": "reference=Reference(resumed=...)",
    "chunk_size": "kl_divergence(chunk_size=...) in a loss of your own; 16 tokens are compared at a time",
}


def naming_the_new(init: Callable[P, None]) -> Callable[P, None]:
    """Have an initialiser raise a TypeError that names what an old argument has become."""

    @wraps(init)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        for old in _NEW.keys() & options.keys():
            raise TypeError(f"KLAlignment has no argument {old!r} any more. Give {_NEW[old]}.")
        given = options.get("reference")
        if isinstance(given, nn.Module):
            raise TypeError(f"reference is a {type(given).__name__}. Give Reference(ref_model=...).")
        init(*args, **options)

    return checked
