"""Two gradient lists, checked and taken apart once: plain tensors from here on."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.parallel import Held, held
from safegrad_optim.surgery._blocks import widened_dtype

Gradients = Sequence[Tensor | None]


class Pairs(NamedTuple):
    """Two gradient lists that can be combined."""

    user_grads: Gradients
    alignment_grads: Gradients
    # Of each parameter, what this rank holds of both, and how many ranks hold and so add up the same.
    pairs: list[tuple[Tensor | None, Tensor | None, int]]
    is_sharded: bool
    device: torch.device  # that of the first gradient
    eps: float  # relative precision of sums over the gradients


def take_apart(user_grads: Gradients, alignment_grads: Gradients) -> Pairs:
    """Check that two gradient lists can be combined entry by entry, and take them apart."""
    if len(user_grads) != len(alignment_grads):
        found = f"{len(user_grads)} user-task gradients != {len(alignment_grads)} alignment gradients"
        raise ValueError(f"{found}. Build both from the same optimizer.param_groups.")
    pairs: list[tuple[Tensor | None, Tensor | None, int]] = []
    parts: list[tuple[Tensor, Held]] = []
    for index, gradients in enumerate(zip(user_grads, alignment_grads, strict=True)):
        own = [None if gradient is None else (gradient, held(gradient)) for gradient in gradients]
        present = [part for part in own if part is not None]
        _check(index, present)
        user, alignment = (None if part is None else part[1].local for part in own)
        pairs.append((user, alignment, present[0][1].copies if present else 1))
        parts += present
    is_sharded = any(part.is_sharded for _, part in parts)
    device = parts[0][0].device if parts else torch.device("cpu")
    eps = max((torch.finfo(widened_dtype(gradient.dtype)).eps for gradient, _ in parts), default=0.0)
    return Pairs(user_grads, alignment_grads, pairs, is_sharded, device, eps)


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
