"""By what a cached reference is known again: digests of everything that makes it what it is."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.batches import Batch, Positions, contents_digest
from safegrad_optim.parallel import local, sum_of_shards

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
    """Compute the fingerprint of what a reference gives on these batches; of shards, in one all-reduce."""
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


def _bit_sum(tensor: Tensor) -> int:
    """Sum of a tensor's bit patterns modulo 2^64: exact, and the same on every device."""
    return int(tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))
