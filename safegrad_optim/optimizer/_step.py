"""The parts of a step: which parameters it moves, whether it may be taken, the surgery, and clipping."""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from safegrad_optim.optimizer._checks import UnprotectedStepError
from safegrad_optim.optimizer._state import OwnState
from safegrad_optim.parallel import is_distributed_tensor, local, on_any_rank, require_same
from safegrad_optim.surgery import (
    GradientProducts,
    Gradients,
    Pairs,
    combine_pairs_,
    decide,
    sums_of,
    take_apart,
)

# At the reference, where training starts, there is nothing to align with for a step or two.
_MOST_NEGLIGIBLE = 10


def trainable_parameters(base: Optimizer) -> list[Tensor]:
    """Return the parameters that a step moves, in the order of groups; frozen ones must have no gradient."""
    parameters = []
    for index, group in enumerate(base.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameters.append(parameter)
            elif parameter.grad is not None:
                found = f"A frozen parameter of shape {tuple(parameter.shape)} in group {index} has a .grad"
                raise UnprotectedStepError(f"{found}, which would be applied unprotected. Set it to None.")
    return parameters


def require_gradients(user_grads: Gradients) -> None:
    """Refuse a step in which no parameter has a gradient to protect."""
    if not user_grads:
        raise UnprotectedStepError(
            "All parameters of this optimizer are frozen, so it trains nothing. Build it over those that are "
            "trained: with adapters, after get_peft_model()."
        )
    if all(grad is None for grad in user_grads):
        raise UnprotectedStepError(
            f"None of the {len(user_grads)} trainable parameters has a gradient, so there is nothing to "
            "protect. Call backward() before step(). Optimizers that step inside backward() leave none, and "
            "move the parameters unprotected: use one that steps afterwards."
        )


def moved_by(base: Optimizer) -> list[bool]:
    """Return for each trainable parameter whether the base moves it, or for none of them that it is so.

    What a learning rate of 0 keeps in place has no say in whether a step conflicts.
    """
    moved = [
        not _is_zero(group.get("lr", 1.0))
        for group in base.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    # At the first step of a warm-up nothing moves, but momentum builds up.
    return moved if any(moved) else [True] * len(moved)


def _is_zero(rate: float | Tensor) -> bool:
    # A tensor on another device would have to be waited for.
    return (not isinstance(rate, Tensor) or rate.device.type == "cpu") and float(rate) == 0.0


def is_state_probe(base: Optimizer, user_grads: Gradients) -> bool:
    """Whether torch.distributed.checkpoint is taking a null step to make the optimizer's state."""
    if base.state or not all(_is_zero(group.get("lr", 1.0)) for group in base.param_groups):
        return False
    present = [grad for grad in user_grads if grad is not None]
    found = any(bool(local(grad).any()) for grad in present)
    # Zeros in the part of one rank say nothing of the others, and all have to go one way.
    return not (on_any_rank(found) if any(map(is_distributed_tensor, present)) else found)


def operate_(own: OwnState, parameters: list[Tensor], alignment_grads: Gradients, moved: list[bool]) -> None:
    """Make each `.grad` the final gradient, decided by the parameters that are moved, and count the step."""
    gradients = take_apart([parameter.grad for parameter in parameters], alignment_grads, moved)
    products = _checked_sums(own, gradients)
    _require_no_overflow(gradients, products, own)
    final, stats = combine_pairs_(gradients, products, own.rho)
    for parameter, grad in zip(parameters, final, strict=True):
        parameter.grad = grad
    if own.max_grad_norm is not None:
        # As torch.nn.utils.clip_grads_with_norm_, which cannot take sharded and plain gradients together.
        factor = torch.clamp(own.max_grad_norm / (stats.final_norm.to(torch.float32) + 1e-6), max=1.0)
        for grad in [local(grad) for grad in final if grad is not None]:
            grad.mul_(factor.to(grad.device))
    own.stats = stats
    own.conflicts = own.conflicts + stats.conflict.long()
    own.negligible = own.negligible + stats.negligible.long()


def _checked_sums(own: OwnState, gradients: Pairs) -> GradientProducts:
    products = sums_of(gradients)
    # The only host read of a step: nothing may change before it is known to be protected.
    read = torch.stack([*products[:3], products.negligible.to(products.inner_product)]).tolist()
    _, user_sq, alignment_sq, negligible = read
    if not own.ranks_agree:
        # Replicas that take different steps would drift apart.
        given = {
            "rho": own.rho.rho,
            "refresh_every": own.refresh_every,
            "max_grad_norm": own.max_grad_norm,
            "user gradients (by ||g||^2)": user_sq,
            "alignment gradients (by ||g||^2)": alignment_sq,
        }
        require_same(
            given,
            "Give all ranks the same options, and gradients averaged over them: DDP and KLAlignment average, "
            "what you compute yourself has to be all-reduced.",
        )
        # A gradient that is zero on all ranks does not tell whether it is averaged over them.
        own.ranks_agree = not negligible
    if negligible or not all(map(math.isfinite, read)):
        # Zero at the reference, where training starts: it must not serve further steps.
        own.pulled = None
    for name, sq_norm in (("alignment", alignment_sq), ("user", user_sq)):
        if not math.isfinite(sq_norm):
            raise UnprotectedStepError(
                f"The {name} gradient is not finite (||g||^2 = {sq_norm}), so no conflict can be "
                "told. Look for an overflow in its loss; zero_grad() and go on with the next batch."
            )
    own.negligible_in_a_row = own.negligible_in_a_row + 1 if negligible else 0
    if own.negligible_in_a_row > _MOST_NEGLIGIBLE:
        raise UnprotectedStepError(
            f"The alignment gradients of {own.negligible_in_a_row} steps in a row were nothing beside the "
            f"user gradients (||g||^2 {alignment_sq:.3g} and {user_sq:.3g}), as only where training starts. "
            "Check that the loss is unscaled before the step, that the attention_mask of the safety rows is "
            "not 0, and that the alignment is of the model that is trained."
        )
    return products


def _require_no_overflow(gradients: Pairs, products: GradientProducts, own: OwnState) -> None:
    """Refuse a final gradient that fp16 cannot hold, before anything is written."""
    halves = [
        (user, alignment)
        for user, alignment, _ in gradients.pairs
        if user is not None and alignment is not None and user.dtype == torch.float16
    ]
    if not halves:
        return
    coefficient, _ = decide(products, own.rho(products))
    largest = [
        (user.float() + coefficient.to(user.device, torch.float32) * alignment.float()).abs().amax()
        for user, alignment in halves
        if user.numel()
    ]
    found = max(float(value) for value in largest)
    if found > torch.finfo(torch.float16).max:
        raise UnprotectedStepError(
            f"The final gradient has an entry of {found:.3g}, which fp16 cannot hold. Unscale the loss "
            "before the step, take a smaller rho, or fp32 parameters under autocast."
        )
