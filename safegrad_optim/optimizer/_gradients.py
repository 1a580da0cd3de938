"""Where the alignment gradient of a step comes from: pushed for one step, or pulled and kept for some."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safegrad_optim._torch_private import version
from safegrad_optim.optimizer._checks import UnprotectedStepError, check_alignment
from safegrad_optim.parallel import local
from safegrad_optim.surgery import Gradients

AlignmentCallable = Callable[[list[Tensor]], Gradients]


@dataclass(kw_only=True)
class AlignmentGradients:
    """The alignment gradients that steps have not used up, and what gives new ones."""

    alignment: AlignmentCallable | None = None
    refresh_every: int = 1
    pushed: list[Tensor | None] | None = None
    pulled: list[Tensor | None] | None = None
    pulled_for: list[Tensor] = field(default_factory=list)
    pulled_age: int = 0  # how many steps the pulled gradient has served

    def push(self, parameters: list[Tensor], grads: Gradients | Mapping[Tensor, Tensor | None]) -> None:
        """Keep a copy of alignment gradients for the next step."""
        ordered = _in_order(parameters, grads) if isinstance(grads, Mapping) else grads
        check_alignment(parameters, ordered)
        self.pushed = [None if grad is None else grad.clone() for grad in ordered]

    def take(self, parameters: list[Tensor]) -> Gradients | None:
        """Return the alignment gradient of this step: the pushed one, else a pulled one, else `None`."""
        if self.pushed is not None:
            grads, self.pushed = self.pushed, None
            check_alignment(parameters, grads)
            return grads
        if self.alignment is None:
            return None
        pulled = self.pulled
        # Freezing some parameters and training others must not give one the gradient of another.
        if pulled is None or list(map(id, parameters)) != list(map(id, self.pulled_for)):
            pulled = _pull(parameters, self.alignment)
            self.pulled_for, self.pulled_age = parameters, 0
        self.pulled_age += 1
        self.pulled = pulled if self.pulled_age < self.refresh_every else None
        return pulled


def on_devices(saved: Gradients | None, parameters: list[Tensor]) -> list[Tensor | None] | None:
    """The pulled gradient of a saved run, which has to be of these parameters."""
    if saved is None:
        return None
    if len(saved) != len(parameters):
        raise ValueError(
            f"The saved alignment gradient is of {len(saved)} parameters, this optimizer has "
            f"{len(parameters)} trainable ones. Freeze the same parameters as the run that saved it."
        )
    pairs = zip(saved, parameters, strict=True)
    pulled = [None if grad is None else grad.to(parameter.device) for grad, parameter in pairs]
    check_alignment(parameters, pulled)
    return pulled


def _pull(parameters: list[Tensor], alignment: AlignmentCallable) -> list[Tensor | None]:
    before = [(parameter.grad, version_of(parameter.grad)) for parameter in parameters]
    with torch.enable_grad():
        grads = list(alignment(parameters))
    for index, (parameter, (grad, written)) in enumerate(zip(parameters, before, strict=True)):
        if parameter.grad is not grad or version_of(grad) != written:
            raise UnprotectedStepError(
                f"Computing the alignment gradient changed the user gradient of parameter {index}. "
                f"{type(alignment).__name__} has to stash and restore .grad around backward()."
            )
    check_alignment(parameters, grads)
    return grads


def _in_order(parameters: list[Tensor], grads: Mapping[Tensor, Tensor | None]) -> list[Tensor | None]:
    missing = [tuple(parameter.shape) for parameter in parameters if parameter not in grads]
    unknown = [getattr(key, "shape", key) for key in grads.keys() - set(parameters)]
    if missing or unknown:
        raise ValueError(
            f"Alignment gradients miss {len(missing)} parameters (of shapes {missing[:3]}) and have "
            f"{len(unknown)} unknown ones ({unknown[:3]}). Give a tensor or None for each trainable one."
        )
    return [grads[parameter] for parameter in parameters]


def version_of(grad: Tensor | None) -> int | None:
    """A count that each write to a gradient raises."""
    return None if grad is None else version(local(grad))
