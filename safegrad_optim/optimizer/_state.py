"""All that SafeGradOptimizer has besides its base optimizer, in one object, and how that is saved."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

from torch import Tensor

from safegrad_optim.optimizer._gradients import AlignmentGradients, on_devices, version_of
from safegrad_optim.surgery import ConstantRho, Gradients, SurgeryStats

OWN_STATE = "safegrad"  # where it is in `state_dict()`, and the prefix of its entries in a parameter group
T = TypeVar("T")


class Kept(Generic[T]):
    """An attribute that is read from the optimizer's `keeper`, and checked whenever it is set there."""

    def __init__(self, keeper: str, check: Callable[[T], None] = lambda value: None) -> None:
        self._keeper = keeper
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> T:
        # On the class there is no keeper yet: tools that look at it get the descriptor.
        return cast(T, self if optimizer is None else getattr(getattr(optimizer, self._keeper), self._name))

    def __set__(self, optimizer: Any, value: T) -> None:
        self._check(value)
        setattr(getattr(optimizer, self._keeper), self._name, value)


class StepCounts(NamedTuple):
    """How many steps an optimizer has taken, and of which kind."""

    steps: int
    conflicts: int  #: whose user gradient conflicted and was projected
    negligible: int  #: whose alignment gradient was zero or rounding noise: plain steps by design
    unprotected: int  #: without an alignment gradient, under `allow_unprotected=True`


@dataclass
class OwnState(AlignmentGradients):
    """Options, and how far the run has come; changed in place, so that what stands in for us shares it."""

    rho: ConstantRho
    max_grad_norm: float | None = None
    allow_unprotected: bool = False
    stats: SurgeryStats | None = None
    steps: int = 0
    conflicts: Tensor | int = 0
    negligible: Tensor | int = 0
    unprotected: int = 0
    ranks_agree: bool = False
    negligible_in_a_row: int = 0
    # The final gradients of a step that the base has not taken yet, and their versions.
    final: list[tuple[Tensor | None, int | None]] = field(default_factory=list)

    @property
    def counts(self) -> StepCounts:
        """Number of steps so far by kind; reading it waits for the device."""
        return StepCounts(self.steps, int(self.conflicts), int(self.negligible), self.unprotected)

    def make_final(self, grads: Gradients) -> None:
        """Remember that the surgery on these gradients is done."""
        self.final = [(grad, version_of(grad)) for grad in grads]

    def is_final(self, grads: Gradients) -> bool:
        """Whether the surgery on these gradients is done, and nothing has written to them since."""
        return len(self.final) == len(grads) and all(
            grad is known and version_of(grad) == version
            for grad, (known, version) in zip(grads, self.final, strict=True)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        alignment: Any = self.alignment
        saved = alignment.state_dict() if hasattr(alignment, "state_dict") else None
        own = {"counts": list(self.counts), "alignment": saved, **self.rho.state_dict()}
        return {**own, "pulled": self.pulled, "pulled_age": self.pulled_age}

    def load_state_dict(self, state: Mapping[str, Any], parameters: list[Tensor]) -> None:
        """Go on where `state` was saved; an alignment or gradient that does not fit changes nothing."""
        pulled = on_devices(state["pulled"], parameters)
        alignment: Any = self.alignment
        if state["alignment"] is not None:
            if not hasattr(alignment, "load_state_dict"):
                found = "none" if alignment is None else f"a {type(alignment).__name__} without a state"
                raise ValueError(
                    f"The saved run had an alignment with a state, this optimizer has {found}. Resume with "
                    "the alignment of the saved run, or set state_dict['safegrad']['alignment'] to None."
                )
            alignment.load_state_dict(state["alignment"])
        self.pulled, self.pulled_for, self.pulled_age = pulled, parameters, state["pulled_age"]
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
