"""Two gradient lists, checked and taken apart once: plain tensors from here on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim.parallel import Held, held, world_size
from safegrad_optim.surgery._pieces import Pieces, widened_dtype

Gradients = Sequence[Tensor | None]

# A tensor of any other class may be placed on ranks.
_PLAIN = (Tensor, nn.Parameter)


class Pair(NamedTuple):
    """What this rank holds of both gradients of a parameter."""

    user: Tensor | None
    alignment: Tensor | None
    weight: float  # of its products in the sums of all ranks


@dataclass(frozen=True)
class Pairs:
    """Two gradient lists that can be combined."""

    user_grads: Gradients
    alignment_grads: Gradients
    pairs: list[Pair]
    is_sharded: bool
    device: torch.device  # that of the first gradient
    eps: float  # relative precision of sums over the gradients

    @cached_property
    def both(self) -> Pieces:
        """The gradients of parameters that have both, but for those that are `apart`."""
        return Pieces(
            ((user, alignment), weight)
            for user, alignment, weight in self.pairs
            if user is not None and alignment is not None and not _has_no_view(user)
        )

    @cached_property
    def apart(self) -> list[tuple[Tensor, Tensor, float]]:
        """Those whose user gradient cannot be written through views: sparse, or conjugated lazily."""
        return [
            (user, alignment, weight)
            for user, alignment, weight in self.pairs
            if user is not None and alignment is not None and _has_no_view(user)
        ]


def _has_no_view(tensor: Tensor) -> bool:
    """Whether there is no view of the values of a tensor as a strided one of reals."""
    return tensor.is_sparse or tensor.is_conj()


def take_apart(
    user_grads: Gradients, alignment_grads: Gradients, counted: Sequence[bool] | None = None
) -> Pairs:
    """Check that two gradient lists can be combined entry by entry, and take them apart.

    Gradients that are not `counted` are combined as all others, but do not enter the sums.
    """
    if len(user_grads) != len(alignment_grads):
        found = f"{len(user_grads)} user-task gradients != {len(alignment_grads)} alignment gradients"
        raise ValueError(f"{found}. Build both from the same optimizer.param_groups.")
    apart: list[tuple[Tensor | None, Tensor | None, int]] = []
    is_sharded, ranks = False, world_size()
    for index, (user, alignment) in enumerate(zip(user_grads, alignment_grads, strict=True)):
        if user is not None and alignment is not None and _are_alike(user, alignment):
            apart.append((user, alignment, ranks))
            continue
        own = [None if gradient is None else (gradient, held(gradient)) for gradient in (user, alignment)]
        present = [part for part in own if part is not None]
        _check(index, present)
        is_sharded = is_sharded or any(part.is_sharded for _, part in present)
        local_user, local_alignment = (None if part is None else part[1].local for part in own)
        apart.append((local_user, local_alignment, present[0][1].copies if present else 1))
    # Without shards each rank has the whole sums.
    weights = [1 / copies if is_sharded else 1.0 for _, _, copies in apart]
    if counted is not None:
        weights = [weight * counts for weight, counts in zip(weights, counted, strict=True)]
    pairs = [Pair(*pair[:2], weight) for pair, weight in zip(apart, weights, strict=True)]
    gradients = [gradient for pair in pairs for gradient in pair[:2] if gradient is not None]
    device = gradients[0].device if gradients else torch.device("cpu")
    dtypes = {gradient.dtype for gradient in gradients}
    eps = max((torch.finfo(widened_dtype(dtype)).eps for dtype in dtypes), default=0.0)
    return Pairs(user_grads, alignment_grads, pairs, is_sharded, device, eps)


def _are_alike(user: Tensor, alignment: Tensor) -> bool:
    """Whether two gradients are plain tensors that can be combined; said at once for what most are."""
    return (
        type(user) in _PLAIN
        and type(alignment) in _PLAIN
        and user.dtype == alignment.dtype
        and user.is_floating_point()
        and user.shape == alignment.shape
        and user.device == alignment.device
    )


def _check(index: int, gradients: list[tuple[Tensor, Held]]) -> None:
    traits: list[dict[str, object]] = []
    for gradient, part in gradients:
        if part.is_pending:
            found = f"Gradient {index} is placed as {part.placement}: its sum over ranks is pending"
            raise NotImplementedError(f"{found}. Redistribute it to the placements of its parameter.")
        dtype, device = gradient.dtype, gradient.device
        if not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"Gradient {index} has dtype {dtype}, expected a floating-point one.")
        shape = tuple(gradient.shape)
        traits.append({"shape": shape, "dtype": dtype, "device": device, "placement": part.placement})
    for what in traits[0] if len(traits) == 2 else ():
        if traits[0][what] != traits[1][what]:
            raise ValueError(
                f"Gradient {index}: user-task {what} {traits[0][what]} != alignment {what} "
                f"{traits[1][what]}. Build both from the same optimizer.param_groups."
            )
