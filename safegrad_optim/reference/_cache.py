"""The reference, computed once: kept in memory or in a safetensors file that knows what it is of."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from safegrad_optim.batches import Batch, Positions, contents_digest
from safegrad_optim.parallel import local, sum_of_shards
from safegrad_optim.reference._kind import Kind

_FORMAT = "safegrad_optim reference 2"
_HEAD = "head"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint(NamedTuple):
    """Digests of everything that makes a cached reference what it is."""

    batches: str
    """Contents of the safety batches and which positions are compared."""
    precision: str
    """Kind of the cache and dtype of autocast."""
    architecture: str
    """Names, shapes and dtypes of the reference's parameters."""
    weights: str
    """Sums over the bits of each of the reference's parameters: any training changes them."""


def fingerprint(
    named_parameters: Iterable[tuple[str, Tensor]],
    batches: list[Batch],
    *,
    positions: Positions,
    kind: str,
    autocast_dtype: torch.dtype | None,
) -> Fingerprint:
    """Compute the fingerprint of the reference that these parameters give on these batches.

    Args:
        named_parameters: the reference's parameters, of any device; sharded ones have the fingerprint of
            the whole, which takes one all-reduce.
        batches: the safety batches in order.
        positions: which tokens are compared.
        kind: what is cached for each of them.
        autocast_dtype: dtype of autocast, `None` for none.
    """
    architecture, weights = hashlib.sha256(), hashlib.sha256()
    names, tensors = zip(*named_parameters, strict=True)
    for name, tensor in zip(names, tensors, strict=True):
        architecture.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    for value in sum_of_shards(tensors, [_bit_sum(local(tensor)) for tensor in tensors]):
        weights.update(value.to_bytes(8, "little", signed=True))
    return Fingerprint(
        batches=contents_digest(batches, positions),
        precision=f"{kind}, autocast {autocast_dtype}",
        architecture=architecture.hexdigest(),
        weights=weights.hexdigest(),
    )


class ReferenceCache:
    """What the reference gives at the compared positions of each safety batch, on the CPU.

    "hidden" keeps the final hidden states, (tokens, hidden size): exact as long as the output head is
    frozen, since the head then maps them to the same logits, or is kept as well. "logits" keeps the logits
    themselves, (tokens, vocabulary), in the dtype the model gave them. "top_k" keeps the tensors of a `TopK`.

    Args:
        entries: for each safety batch its tensors, rows in the order of its compared positions.
        kind: which of the three they are.
        precision: dtypes that the reference ran in, see `Outputs`.
        head: weight and bias of the reference's output head, where it is kept.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Tensor, ...]],
        kind: Kind,
        precision: str,
        head: tuple[Tensor, ...] = (),
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
        own = {"format": _FORMAT, "kind": self.kind, "dtypes": self.precision}
        metadata = {**own, **identity._asdict()}
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(
        cls, path: Path, identity: Fingerprint, *, check_weights: bool
    ) -> tuple["ReferenceCache", Fingerprint]:
        """Read a cache and check that it is the reference it is meant to be.

        Args:
            path: the safetensors file.
            identity: the fingerprint it has to have.
            check_weights: whether the weights have to match as well; they cannot where the model
                that gave the reference has been trained on.

        Returns:
            The cache and the fingerprint it was saved with.

        Raises:
            ValueError: the file is of other batches, precision, architecture or weights.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} is no cached reference (format {metadata.get('format')!r}, expected "
                    f"{_FORMAT!r}). Give another cache_file, or delete it to compute it anew."
                )
            for field, expected in identity._asdict().items():
                if field == "weights" and not check_weights:
                    continue
                if metadata.get(field) != expected:
                    resumed = " If the model has been fine-tuned since, pass resumed=True."
                    raise ValueError(
                        f"{path} is the reference of other {field}: found {_short(metadata[field])}, "
                        f"expected {_short(expected)}. Restore the original {field}; or, before any "
                        "fine-tuning, give another cache_file to compute the reference anew."
                        + (resumed if field == "weights" else "")
                    )
            groups = groupby(sorted(file.keys()), key=lambda key: key.partition(".")[0])
            entries = {name: tuple(map(file.get_tensor, keys)) for name, keys in groups}
            # Not left in the mapping, whose alignment in memory is another than that of the original.
            head = tuple(tensor.clone() for tensor in entries.pop(_HEAD, ()))
            kind = next(kind for kind in get_args(Kind) if kind == metadata["kind"])
            cache = cls(list(entries.values()), kind, metadata["dtypes"], head)
            return cache, identity._replace(weights=metadata["weights"])


def _short(value: str) -> str:
    return value if len(value) < 40 else value[:12]


def _bit_sum(tensor: Tensor) -> int:
    """Sum of a tensor's bit patterns modulo 2^64: exact, and the same on every device."""
    return int(tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))
