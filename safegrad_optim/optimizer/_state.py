"""All that SafeGradOptimizer has besides its base optimizer, in one object, and how that is saved."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from safegrad_optim.optimizer._gradients import AlignmentCallable, AlignmentGradients
from safegrad_optim.surgery import ConstantRho, SurgeryStats

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
    gradients: AlignmentGradients = field(default_factory=AlignmentGradients)
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

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        alignment: Any = self.alignment
        saved = alignment.state_dict() if hasattr(alignment, "state_dict") else None
        own = {"counts": list(self.counts), "alignment": saved}
        return own | self.gradients.state_dict() | self.rho.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], parameters: list[Tensor]) -> None:
        """Go on where `state` was saved; an alignment or gradient that does not fit changes nothing."""
        gradients = AlignmentGradients()
        gradients.load_state_dict(state, parameters)
        alignment: Any = self.alignment
        if state["alignment"] is not None and hasattr(alignment, "load_state_dict"):
            alignment.load_state_dict(state["alignment"])
        self.gradients = gradients
        # States of before have no rho.
        if state.get("rho", self.rho.rho) != self.rho.rho:
            warnings.warn(
                f"The saved run has rho {state['rho']}, this optimizer {self.rho.rho}; it goes on with the "
                "saved one. Set optimizer.rho after load_state_dict() to have another.",
                stacklevel=3,
            )
        self.rho.load_state_dict({**self.rho.state_dict(), **state})
        self.steps, self.conflicts, self.negligible, self.unprotected = state["counts"]


def as_numbers(own: Mapping[str, Any]) -> dict[str, float]:
    """State of our own, less the gradient, as entries of a parameter group."""
    numbers: dict[str, Any] = dict(zip(StepCounts._fields, own["counts"], strict=True)) | {"rho": own["rho"]}
    alignment = own["alignment"] or {}
    if all(isinstance(value, int | float) for value in alignment.values()):
        numbers |= alignment
    return {f"{OWN_STATE}_{name}": value for name, value in numbers.items()}


def without_numbers(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Parameter groups as the base optimizer knows them, and our own state if they had entries of it."""
    prefix = f"{OWN_STATE}_"
    bare = [dict(group) for group in groups]
    numbers: dict[str, Any] = {}
    for group in bare:
        for key in [key for key in group if key.startswith(prefix)]:
            numbers[key.removeprefix(prefix)] = group.pop(key)
    if not numbers:
        return bare, None
    own: dict[str, Any] = {"counts": [numbers.pop(name) for name in StepCounts._fields]}
    own |= {"rho": numbers.pop("rho")} if "rho" in numbers else {}
    return bare, {**own, "pulled": None, "pulled_age": 0, "alignment": numbers or None}
