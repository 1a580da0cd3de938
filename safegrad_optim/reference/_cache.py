"""The reference, computed once: kept in memory or in a safetensors file that knows what it is of."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from safegrad_optim._torch_private import parts_of
from safegrad_optim.batches import DATED, add_contents
from safegrad_optim.parallel import local, sum_of_shards

_FORMAT = "safegrad_optim reference 3"
_HEAD = "head"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Digest names, shapes and contents of parameters; any training changes "weights"."""
    architecture, weights = hashlib.sha256(), hashlib.sha256()
    tensors, sums = [], []
    for name, tensor in parameters:
        architecture.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        tensors.append(tensor)
        sums.append(sum_of_bits(tensor))
    for value in sum_of_shards(tensors, sums):
        weights.update(value.to_bytes(8, "little", signed=True))
    return {"architecture": architecture.hexdigest(), "weights": weights.hexdigest()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    add_contents(digest, tensors)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a cached reference ({error}). Restore it; or, before any fine-tuning, "
            "delete it to compute the reference anew."
        ) from error


def sum_of_bits(tensor: Tensor) -> int:
    """Sum the bit patterns that this rank holds modulo 2^64: exact, and the same on every device."""
    held = local(tensor).detach()
    if held.device.type == "meta":
        raise NotImplementedError(
            f"A weight of shape {tuple(held.shape)} is on the meta device: accelerate has offloaded it, so "
            "that nothing tells whether it changes. Load the model without offloading, all on GPU or CPU."
        )
    # Quantised weights, as torchao's, are made of plain tensors.
    parts = parts_of(held)
    return sum(int(part.view(_BITS[part.element_size()]).sum(dtype=torch.int64)) for part in parts)


@dataclass
class ReferenceCache:
    """What the reference gives at the compared positions of each safety batch, on the CPU."""

    entries: Sequence[tuple[Tensor, ...]]  # a row for each compared position, in their order
    kind: str  # name of the `Kind` that they are of
    precision: str  # that the reference ran in, see `Outputs`
    head: tuple[Tensor, ...] = ()  # weight and bias of its output head, where that is kept

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for entry in (*self.entries, self.head) for tensor in entry)

    def save(self, path: Path, identity: dict[str, str]) -> None:
        """Write the cache and its fingerprint to a safetensors file, complete or not at all."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        tensors = {f"{_HEAD}.{part}": tensor.contiguous() for part, tensor in enumerate(self.head)}
        for index, entry in enumerate(self.entries):
            tensors |= {f"{index:06d}.{part}": tensor.contiguous() for part, tensor in enumerate(entry)}
        contents = _digest(tensors)
        metadata = {"format": _FORMAT, "kind": self.kind, "dtypes": self.precision, "contents": contents}
        metadata |= identity
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, own: dict[str, str], *, check_weights: bool) -> tuple[Self, dict[str, str]]:
        """Read a cache and its fingerprint, whose weights may be others where the model was trained on."""
        with _opened(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} is no cached reference: format {metadata.get('format')!r}, expected "
                    f"{_FORMAT!r}. Give another file, or delete this one."
                )
            for field, expected in own.items():
                if metadata[field] != expected and (field != "weights" or check_weights):
                    hints = {
                        "weights": "; if fine-tuned since, give Reference(resumed=True)",
                        "batches": f" ({DATED})",
                    }
                    raise ValueError(
                        f"{path} is the reference of other {field}: found {metadata[field]:.40}, expected "
                        f"{expected:.40}. Restore the original {field}{hints.get(field, '')}; or, before any "
                        "fine-tuning, give another file to compute it anew."
                    )
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
        if _digest(tensors) != metadata["contents"]:
            raise ValueError(
                f"{path} does not hold what was written to it: the digest of its contents is another. "
                "Restore it; or, before any fine-tuning, delete it to compute the reference anew."
            )
        groups = groupby(tensors, key=lambda key: key.partition(".")[0])
        entries = {name: tuple(tensors[key] for key in keys) for name, keys in groups}
        # Not left in the mapping, whose alignment in memory is another than that of the original.
        head = tuple(tensor.clone() for tensor in entries.pop(_HEAD, ()))
        cache = cls(list(entries.values()), metadata["kind"], metadata["dtypes"], head)
        return cache, {name: metadata[name] for name in own}
