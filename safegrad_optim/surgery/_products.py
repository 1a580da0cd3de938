"""The sums over all elements of two gradients that decide a step, accumulated in fp32 or better."""

from typing import NamedTuple

import torch
from torch import Tensor

from safegrad_optim.parallel import copies, is_distributed_tensor, local, sum_over_ranks
from safegrad_optim.surgery._blocks import Weighted, blocks, widened_dtype
from safegrad_optim.surgery._checks import Gradients, check_gradients


class GradientProducts(NamedTuple):
    """The four sums that decide a step; each a 0-dim fp64 tensor (fp32 where fp64 is missing)."""

    inner_product: Tensor
    """<g_user, g_align> over all parameters that have both gradients."""
    user_sq_norm: Tensor
    """||g_user||^2."""
    alignment_sq_norm: Tensor
    """||g_align||^2 over all parameters."""
    shared_alignment_sq_norm: Tensor
    """||g_align||^2 over the parameters that also have a user gradient."""
    eps: float
    """Relative precision of the accumulation; an alignment gradient below it is noise."""


@torch.no_grad()
def inner_products(user_grads: Gradients, alignment_grads: Gradients) -> GradientProducts:
    """Compute the inner product and squared norms of two gradients.

    <u, a> = sum_i sum(u_i * a_i), likewise <u, u> and <a, a>, one sum over all tensors together.

    With DTensors among them all ranks have to call this, and it takes one all-reduce.

    Args:
        user_grads: gradients of the user's loss, `None` where a parameter has none.
        alignment_grads: gradients of the alignment loss; same order, shapes, dtypes and devices.

    Returns:
        The sums as 0-dim tensors on the device of the first gradient.

    Raises:
        ValueError: the lists cannot be combined, see `check_gradients`.
    """
    check_gradients(user_grads, alignment_grads)
    sharded = is_sharded(user_grads, alignment_grads)
    both: list[Weighted] = []
    user_only: list[Weighted] = []
    alignment_only: list[Weighted] = []
    cross: list[Tensor] = []
    user_sq: list[Tensor] = []
    shared_sq: list[Tensor] = []
    other_sq: list[Tensor] = []
    for index, (user, alignment) in enumerate(zip(user_grads, alignment_grads, strict=True)):
        # Each rank that holds the same elements adds them up as well.
        share = 1 / _held(user, alignment) if sharded else 1.0
        user, alignment = _local(user), _local(alignment)
        if user is not None and alignment is not None:
            if user.layout != alignment.layout:
                raise ValueError(
                    f"Gradient {index}: user-task layout {user.layout} != alignment layout "
                    f"{alignment.layout}. Build both with the same model."
                )
            both.append((dense(user, alignment), share))
        elif user is not None:
            user_only.append((dense(user), share))
        elif alignment is not None:
            alignment_only.append((dense(alignment), share))
    for block in blocks(both):
        u, a = block.values
        cross.append(dot(u, a, block.weight))
        user_sq.append(dot(u, u, block.weight))
        shared_sq.append(dot(a, a, block.weight))
    for squares, one_sided in ((user_sq, user_only), (other_sq, alignment_only)):
        for block in blocks(one_sided):
            (value,) = block.values
            squares.append(dot(value, value, block.weight))
    device = _device(user_grads, alignment_grads)
    sums = torch.stack([total(values, device) for values in (cross, user_sq, shared_sq, other_sq)])
    inner, user_total, shared, other = (sum_over_ranks(sums) if sharded else sums).unbind()
    return GradientProducts(
        inner_product=inner,
        user_sq_norm=user_total,
        alignment_sq_norm=shared + other,
        shared_alignment_sq_norm=shared,
        eps=_eps(user_grads, alignment_grads),
    )


def is_sharded(*lists: Gradients) -> bool:
    """Whether any gradient is a DTensor."""
    return any(g is not None and is_distributed_tensor(g) for gradients in lists for g in gradients)


def dense(*gradients: Tensor) -> tuple[Tensor, ...]:
    """Gradients as they are; sparse COO ones as values on the union of their indices, zero where missing."""
    if not gradients[0].is_sparse:
        return gradients
    union = sum((gradient.detach() * 0 for gradient in gradients[1:]), gradients[0].detach() * 0)
    return tuple((gradient + union).coalesce().values() for gradient in gradients)


def dot(left: Tensor, right: Tensor, weight: float = 1.0) -> Tensor:
    """Inner product of two 1-D tensors, times a weight."""
    product = torch.dot(left, right)
    return product if weight == 1.0 else product.double() * weight


def total(sums: list[Tensor], device: torch.device) -> Tensor:
    """Sum of 0-dim tensors from whatever devices, in fp64 where the device has it."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    if not sums:
        return torch.zeros((), dtype=wide, device=device)
    return torch.stack([value.to(device) for value in sums]).to(wide).sum()


def _held(user: Tensor | None, alignment: Tensor | None) -> int:
    """How many ranks hold the elements of an entry that this one holds, and so add them up as well."""
    gradient = alignment if user is None else user
    return 1 if gradient is None else copies(gradient)


def _local(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else local(gradient)


def _device(*lists: Gradients) -> torch.device:
    for gradients in lists:
        for gradient in gradients:
            if gradient is not None:
                return gradient.device
    return torch.device("cpu")


def _eps(*lists: Gradients) -> float:
    present = [g.dtype for gradients in lists for g in gradients if g is not None]
    return max((torch.finfo(widened_dtype(dtype)).eps for dtype in present), default=0.0)
