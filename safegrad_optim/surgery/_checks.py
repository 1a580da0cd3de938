"""Which gradient lists can be combined."""

from collections.abc import Sequence

from torch import Tensor

from safegrad_optim.parallel import is_partial, placement

Gradients = Sequence[Tensor | None]

# What two gradients of a parameter have in common.
_TRAITS = ("shape", "dtype", "device", "placement")


def check_gradients(user_grads: Gradients, alignment_grads: Gradients) -> None:
    """Check that two gradient lists can be combined entry by entry.

    Args:
        user_grads: gradients of the user's loss, `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss in the same order.

    Raises:
        ValueError: lengths, shapes, dtypes, devices or placements differ, or a dtype has no gradients.
        NotImplementedError: an entry is a DTensor whose sum over ranks is pending (`Partial`).
    """
    if len(user_grads) != len(alignment_grads):
        raise ValueError(
            f"{len(user_grads)} user-task gradients != {len(alignment_grads)} alignment gradients. "
            "Build both from the same optimizer.param_groups."
        )
    for index, (user, alignment) in enumerate(zip(user_grads, alignment_grads, strict=True)):
        for gradient in (user, alignment):
            if gradient is None:
                continue
            if is_partial(gradient):
                raise NotImplementedError(
                    f"Gradient {index} is placed as {placement(gradient)}: its sum over ranks is pending. "
                    "Redistribute it to the placements of its parameter."
                )
            if not (gradient.is_floating_point() or gradient.is_complex()):
                raise ValueError(
                    f"Gradient {index} has dtype {gradient.dtype}, expected a floating-point one."
                )
        if user is None or alignment is None:
            continue
        traits = zip(_TRAITS, _traits(user), _traits(alignment), strict=True)
        for what, found, other in traits:
            if found != other:
                raise ValueError(
                    f"Gradient {index}: user-task {what} {found} != alignment {what} {other}. "
                    "Build both from the same optimizer.param_groups."
                )


def _traits(gradient: Tensor) -> tuple[object, ...]:
    return tuple(gradient.shape), gradient.dtype, gradient.device, placement(gradient)
