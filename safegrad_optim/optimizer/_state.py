"""All that SafeGradOptimizer has besides its base optimizer, in one object, and how that is saved."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from safegrad_optim._torch_private import version
from safegrad_optim.optimizer._checks import UnprotectedStepError, check_alignment
from safegrad_optim.parallel import local
from safegrad_optim.surgery import ConstantRho, Gradients, SurgeryStats

AlignmentCallable = Callable[[list[Tensor]], Gradients]
OWN_STATE = "safegrad"
"""The key of `state_dict()` under which it is, and the prefix of its entries in a parameter group."""
T = TypeVar("T")


class Kept(Generic[T]):
    """An attribute that is read from the optimizer's `keeper`, and checked whenever it is set there."""

    def __init__(self, keeper: str, check: Callable[[T], None] = lambda value: None) -> None:
        self._keeper = keeper
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> T:
        value: T = getattr(getattr(optimizer, self._keeper), self._name)
        return value

    def __set__(self, optimizer: Any, value: T) -> None:
        self._check(value)
        setattr(getattr(optimizer, self._keeper), self._name, value)


class StepCounts(NamedTuple):
    """How many steps an optimizer has taken, and of which kind."""

    steps: int
    conflicts: int  # whose user gradient conflicted and was projected
    negligible: int  # whose alignment gradient was zero or rounding noise: plain steps by design
    unprotected: int  # without an alignment gradient, under `allow_unprotected=True`


@dataclass
class OwnState:
    """Options, and how far the run has come; changed in place, so that what stands in for us shares it."""

    rho: ConstantRho
    alignment: AlignmentCallable | None = None
    max_grad_norm: float | None = None
    refresh_every: int = 1
    allow_unprotected: bool = False
    pushed: list[Tensor | None] | None = None
    pulled: list[Tensor | None] | None = None
    pulled_for: list[Tensor] = field(default_factory=list)
    pulled_age: int = 0  # how many steps the pulled gradient has served
    stats: SurgeryStats | None = None
    steps: int = 0
    conflicts: Tensor | int = 0
    negligible: Tensor | int = 0
    unprotected: int = 0
    ranks_agree: bool = False

    @property
    def counts(self) -> StepCounts:
        """Number of steps so far by kind; reading it waits for the device."""
        return StepCounts(self.steps, int(self.conflicts), int(self.negligible), self.unprotected)

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

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        alignment: Any = self.alignment
        saved = alignment.state_dict() if hasattr(alignment, "state_dict") else None
        own = {"counts": list(self.counts), "alignment": saved, **self.rho.state_dict()}
        return {**own, "pulled": self.pulled, "pulled_age": self.pulled_age}

    def load_state_dict(self, state: Mapping[str, Any], parameters: list[Tensor]) -> None:
        """Go on where `state` was saved; an alignment or gradient that does not fit changes nothing."""
        pulled = _on_devices(state["pulled"], parameters)
        alignment: Any = self.alignment
        if state["alignment"] is not None and hasattr(alignment, "load_state_dict"):
            alignment.load_state_dict(state["alignment"])
        self.pushed, self.pulled = None, pulled
        self.pulled_for, self.pulled_age = parameters, state["pulled_age"]
        # States of before have no rho.
        if state.get("rho", self.rho.rho) != self.rho.rho:
            warnings.warn(
                f"The saved run has rho {state['rho']}, this optimizer {self.rho.rho}; it goes on with the "
                "saved one. Set optimizer.rho after load_state_dict() to have another.",
                stacklevel=3,
            )
        self.rho.load_state_dict({**self.rho.state_dict(), **state})
        self.steps, self.conflicts, self.negligible, self.unprotected = state["counts"]


def merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """State of the base optimizer with our own, of which numbers are in the first parameter group as well."""
    numbers: dict[str, Any] = dict(zip(StepCounts._fields, own["counts"], strict=True)) | {"rho": own["rho"]}
    alignment = own["alignment"] or {}
    if all(isinstance(value, int | float) for value in alignment.values()):
        numbers |= alignment
    first, *others = base["param_groups"]
    first = {**first, **{f"{OWN_STATE}_{name}": value for name, value in numbers.items()}}
    return {**base, OWN_STATE: own, "param_groups": [first, *others]}


def split(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """State as the base optimizer knows it, and our own, made of its numbers where it has only these."""
    prefix = f"{OWN_STATE}_"
    groups = [dict(group) for group in state_dict["param_groups"]]
    numbers: dict[str, Any] = {}
    for group in groups:
        for key in [key for key in group if key.startswith(prefix)]:
            numbers[key.removeprefix(prefix)] = group.pop(key)
    base = {key: value for key, value in state_dict.items() if key != OWN_STATE} | {"param_groups": groups}
    if OWN_STATE in state_dict or not numbers:
        return base, state_dict.get(OWN_STATE)
    own: dict[str, Any] = {"counts": [numbers.pop(name) for name in StepCounts._fields]}
    own |= {"rho": numbers.pop("rho")} if "rho" in numbers else {}
    return base, {**own, "pulled": None, "pulled_age": 0, "alignment": numbers or None}


def _on_devices(saved: Gradients | None, parameters: list[Tensor]) -> list[Tensor | None] | None:
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
