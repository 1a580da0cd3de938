"""Weights that have to stay what they are: any write to them is noticed, and told by their content."""

from collections.abc import Callable, Iterable

from torch import Tensor

from safegrad_optim._torch_private import version
from safegrad_optim.parallel import held, local
from safegrad_optim.reference._cache import fingerprint, sum_of_bits

Named = Callable[[], Iterable[tuple[str, Tensor]]]


def marks_of(named: Iterable[tuple[str, Tensor]]) -> list[tuple[int, int]]:
    """Return what tells tensors that were replaced or written to, without reading them."""
    return [(id(tensor), version(local(tensor))) for _, tensor in named]


class Watch:
    """Notices when weights are not any more what they were when it was made."""

    def __init__(self, what: str, named: Named) -> None:
        self._what = what
        self._named = named
        self._marks = marks_of(named())
        self._held = _held(named())
        self._whole = fingerprint(named())

    def check(self) -> None:
        """Raise a ValueError if the weights are others; writing the same values again is no change."""
        marks = marks_of(self._named())
        if marks == self._marks:
            return
        now = _held(self._named())
        # Each rank by itself, for whether a shard is written to in a pass may differ between ranks; all
        # together where the weights were sharded since, which is the same on all.
        if [share for share, _ in now] == [share for share, _ in self._held]:
            changed = now != self._held
        else:
            changed = fingerprint(self._named()) != self._whole
        if changed:
            raise ValueError(
                f"{self._what} changed since KLAlignment was built, so that P_ref is not the aligned model "
                "any more. Leave it as it is; or give the aligned model as Reference(ref_model=...), or keep "
                "what it gives with Reference(cache='logits')."
            )
        self._marks, self._held = marks, now


def _held(named: Iterable[tuple[str, Tensor]]) -> list[tuple[tuple[str, tuple[int, ...], str], int]]:
    """Return of each tensor what it is and how it lies on the ranks, and the sum of what this rank holds."""
    return [
        ((name, tuple(tensor.shape), held(tensor).placement), sum_of_bits(tensor)) for name, tensor in named
    ]
