"""What SafeGradOptimizer refuses, so that no step goes unprotected."""

import inspect

import torch
from torch import Tensor
from torch.optim import Optimizer

from safegrad_optim.surgery import Gradients, take_apart

_REFUSED_OPTIONS = {
    "differentiable": "but surgery is not recorded by autograd. Build it with differentiable=False.",
    "maximize": "which would maximize the alignment loss too. Set maximize=False and negate the loss.",
}


_NEEDED = ("param_groups", "state", "step", "zero_grad", "add_param_group", "state_dict", "load_state_dict")


class UnprotectedStepError(RuntimeError):
    """A step was refused, with nothing changed, because it would have gone unprotected."""


def check_base(base: Optimizer) -> None:
    """Check that an optimizer can be wrapped; see `SafeGradOptimizer` for what is raised."""
    name = type(base).__name__
    if hasattr(base, "set_alignment_grad"):
        raise TypeError("base_optimizer is a SafeGradOptimizer already; wrap the bare optimizer.")
    lacking = [attribute for attribute in _NEEDED if not hasattr(base, attribute)]
    if lacking and not isinstance(base, Optimizer):
        raise TypeError(
            f"base_optimizer is a {name}, expected a torch.optim.Optimizer instance, or what has all that is "
            f"used of one; it lacks {', '.join(lacking)}."
        )
    lacking += [a for a in ("defaults", "_optimizer_step_pre_hooks") if not hasattr(base, a)]
    if lacking and isinstance(base, Optimizer):
        raise TypeError(
            f"{name} lacks {', '.join(lacking)}: it has not run Optimizer.__init__, so its steps cannot be "
            "told from those past the surgery. If it stands in for another optimizer (accelerator.prepare), "
            "wrap that one, then prepare the wrapper."
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        found = f"{name} evaluates its closure several times inside one step, past the surgery"
        raise TypeError(f"{found}. Use an optimizer whose step() takes no closure, such as AdamW.")
    check_groups(base)


def check_groups(base: Optimizer) -> None:
    """Check that no option of an optimizer or of its groups undoes the surgery."""
    name = type(base).__name__
    groups = {f"Group {index} of {name}": group for index, group in enumerate(base.param_groups)}
    # Optimizers of pytorch_optimizer keep maximize on themselves.
    itself = {name: {"maximize": getattr(base, "maximize", False)}}
    for place, options in (itself | groups).items():
        for option, reason in _REFUSED_OPTIONS.items():
            if options.get(option):
                raise ValueError(f"{place} has {option}=True, {reason}")


def check_alignment(parameters: list[Tensor], grads: Gradients) -> None:
    """Check that alignment gradients fit those of the parameters and that there is one at all."""
    take_apart([_like_its_gradient(parameter) for parameter in parameters], grads)
    if all(grad is None for grad in grads):
        raise ValueError(
            f"All {len(grads)} alignment gradients are None: their loss has no parameter of this optimizer. "
            "Compute it with the model that is optimized; if DeepSpeed ZeRO put others in place, use FSDP2."
        )


def _like_its_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, or where there is none yet, what has its shape and dtype."""
    if parameter.grad is not None:
        return parameter.grad
    dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
    return parameter if dtype == parameter.dtype else torch.empty_like(parameter, dtype=dtype)


def check_callable(alignment: object) -> None:
    """Check what gives the alignment gradient."""
    if alignment is not None and not callable(alignment):
        found = f"alignment is a {type(alignment).__name__}, expected a callable such as KLAlignment"
        raise TypeError(f"{found}. Give gradients to set_alignment_grad() instead.")


def check_max_grad_norm(norm: float | None) -> None:
    """Check what the final gradient is clipped to."""
    if norm is not None and not norm > 0.0:
        raise ValueError(f"max_grad_norm is {norm}, expected a number > 0 or None.")


def check_refresh_every(steps: int) -> None:
    """Check how many steps an alignment gradient serves."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"refresh_every is {steps}, expected a whole number >= 1.")
