"""The parts of a step: which parameters it moves, whether it may be taken, the surgery, and clipping."""

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from safegrad_optim.optimizer._checks import UnprotectedStepError
from safegrad_optim.optimizer._state import OwnState
from safegrad_optim.parallel import is_distributed_tensor, local, on_any_rank, require_same
from safegrad_optim.surgery import GradientProducts, Gradients, Pairs, combine_pairs_, sums_of, take_apart


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


def is_state_probe(base: Optimizer, user_grads: Gradients) -> bool:
    """Whether torch.distributed.checkpoint is taking a null step to make the optimizer's state."""
    if base.state or any(float(group.get("lr", 1.0)) != 0.0 for group in base.param_groups):
        return False
    present = [grad for grad in user_grads if grad is not None]
    found = any(bool(local(grad).any()) for grad in present)
    # Zeros in the part of one rank say nothing of the others, and all have to go one way.
    return not (on_any_rank(found) if any(map(is_distributed_tensor, present)) else found)


def operate_(own: OwnState, parameters: list[Tensor], alignment_grads: Gradients) -> None:
    """Make the `.grad` of the parameters the final gradient, and count the step by its kind."""
    gradients = take_apart([parameter.grad for parameter in parameters], alignment_grads)
    final, stats = combine_pairs_(gradients, _checked_sums(own, gradients), own.rho)
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
    inner, user_sq, alignment_sq, negligible = read
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
    if not math.isfinite(inner):
        raise UnprotectedStepError(f"The inner product of user and alignment gradient overflows ({inner}).")
    return products
