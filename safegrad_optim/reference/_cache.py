"""The reference, computed once: kept in memory or in a safetensors file that knows what it is of."""

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from torch import Tensor

from safegrad_optim.reference._fingerprint import Fingerprint

_FORMAT = "safegrad_optim reference 2"
_HEAD = "head"


class ReferenceCache:
    """What the reference gives at the compared positions of each safety batch, on the CPU.

    Args:
        entries: for each safety batch its tensors, rows in the order of its compared positions.
        kind: name of the `Kind` that they are of.
        precision: dtypes that the reference ran in, see `Outputs`.
        head: weight and bias of the reference's output head, where it is kept.
    """

    def __init__(
        self, entries: Sequence[tuple[Tensor, ...]], kind: str, precision: str, head: tuple[Tensor, ...] = ()
    ) -> None:
        self.entries = entries
        self.kind = kind
        self.precision = precision
        self.head = head

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for entry in (*self.entries, self.head) for tensor in entry)

    def save(self, path: Path, identity: Fingerprint) -> None:
        """Write the cache and its fingerprint to a safetensors file, complete or not at all."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        named = [*((f"{index:06d}", entry) for index, entry in enumerate(self.entries)), (_HEAD, self.head)]
        tensors = {
            f"{name}.{part}": tensor.contiguous()
            for name, entry in named
            for part, tensor in enumerate(entry)
        }
        metadata = {"format": _FORMAT, "kind": self.kind, "dtypes": self.precision, **identity._asdict()}
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: Path, identity: Fingerprint, *, check_weights: bool
    ) -> tuple["ReferenceCache", Fingerprint]:
        """Read a cache of a certain fingerprint, and return it with the fingerprint it was saved with.

        The weights may differ where the model that gave the reference has been trained on.

        Raises:
            ValueError: the file is of other batches, precision, architecture or weights.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, identity, check_weights)
            groups = groupby(sorted(file.keys()), key=lambda key: key.partition(".")[0])
            entries = {name: tuple(map(file.get_tensor, keys)) for name, keys in groups}
            # Not left in the mapping, whose alignment in memory is another than that of the original.
            head = tuple(tensor.clone() for tensor in entries.pop(_HEAD, ()))
            cache = cls(list(entries.values()), metadata["kind"], metadata["dtypes"], head)
            return cache, identity._replace(weights=metadata["weights"])


def _check(path: Path, metadata: dict[str, str], identity: Fingerprint, check_weights: bool) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no cached reference (format {metadata.get('format')!r}, expected {_FORMAT!r}). Give "
            "another file, or delete it to compute it anew."
        )
    for field, expected in identity._asdict().items():
        if metadata[field] != expected and (field != "weights" or check_weights):
            resumed = " If the model has been fine-tuned since, give Reference(resumed=True)."
            raise ValueError(
                f"{path} is the reference of other {field}: found {_short(metadata[field])}, expected "
                f"{_short(expected)}. Restore the original {field}; or, before any fine-tuning, give another "
                f"file to compute the reference anew.{resumed if field == 'weights' else ''}"
            )


def _short(value: str) -> str:
    return value if len(value) < 40 else value[:12]
