"""Where the alignment gradient of a step comes from: pushed for one step, or pulled and kept for some."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from safegrad_optim._torch_private import version
from safegrad_optim.optimizer._checks import UnprotectedStepError, check_alignment
from safegrad_optim.parallel import local
from safegrad_optim.surgery import Gradients

AlignmentCallable = Callable[[list[Tensor]], Gradients]


@dataclass
class AlignmentGradients:
    """The alignment gradients that steps have not used up."""

    pushed: list[Tensor | None] | None = None
    pulled: list[Tensor | None] | None = None
    pulled_for: list[Tensor] = field(default_factory=list)
    age: int = 0  # how many steps the pulled one has served

    def push(self, parameters: list[Tensor], grads: Gradients | Mapping[Tensor, Tensor | None]) -> None:
        """Keep a copy of gradients for the next step."""
        if isinstance(grads, Mapping):
            grads = _in_order(parameters, grads)
        check_alignment(parameters, grads)
        self.pushed = [None if grad is None else grad.clone() for grad in grads]

    def take(
        self, parameters: list[Tensor], alignment: AlignmentCallable | None, refresh_every: int
    ) -> Gradients | None:
        """Return the gradient of this step: the pushed one, else a pulled one, `None` if there is neither."""
        if self.pushed is not None:
            grads, self.pushed = self.pushed, None
            check_alignment(parameters, grads)
            return grads
        if alignment is None:
            return None
        pulled = self.pulled
        # Freezing some parameters and training others must not give one the gradient of another.
        if pulled is None or list(map(id, parameters)) != list(map(id, self.pulled_for)):
            pulled = _pull(parameters, alignment)
            self.pulled_for, self.age = parameters, 0
        self.age += 1
        self.pulled = pulled if self.age < refresh_every else None
        return pulled

    def drop(self) -> None:
        """Have what was pulled serve no further step."""
        self.pulled = None

    def state_dict(self) -> dict[str, Any]:
        """Return the pulled gradient that still serves steps, and how many it has served."""
        return {"pulled": self.pulled, "pulled_age": self.age}

    def load_state_dict(self, state: Mapping[str, Any], parameters: list[Tensor]) -> None:
        """Go on with the pulled gradient of a saved run, which has to be of these parameters."""
        saved = state["pulled"]
        if saved is not None:
            if len(saved) != len(parameters):
                raise ValueError(
                    f"The saved alignment gradient is of {len(saved)} parameters, this optimizer has "
                    f"{len(parameters)} trainable ones. Freeze the same parameters as the run that saved it."
                )
            pairs = zip(saved, parameters, strict=True)
            saved = [None if grad is None else grad.to(parameter.device) for grad, parameter in pairs]
            check_alignment(parameters, saved)
        self.pulled, self.pulled_for, self.age = saved, parameters, state["pulled_age"]


def _pull(parameters: list[Tensor], alignment: AlignmentCallable) -> list[Tensor | None]:
    before = [(parameter.grad, _version(parameter.grad)) for parameter in parameters]
    with torch.enable_grad():
        grads = list(alignment(parameters))
    for index, (parameter, (grad, written)) in enumerate(zip(parameters, before, strict=True)):
        if parameter.grad is not grad or _version(grad) != written:
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


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else version(local(grad))
