"""What SafeGradOptimizer knows besides its base optimizer, and how that is saved with it."""

from typing import Any, NamedTuple

OWN_STATE = "safegrad"
"""The key of `state_dict()` under which it is, and the prefix of its entries in a parameter group."""


class StepCounts(NamedTuple):
    """How many steps an optimizer has taken, and of which kind."""

    steps: int
    """All steps."""
    conflicts: int
    """Steps whose user gradient conflicted and was projected."""
    negligible: int
    """Steps whose alignment gradient was zero or rounding noise: plain steps by design."""
    unprotected: int
    """Steps without an alignment gradient, under `allow_unprotected=True`."""


def as_numbers(own: dict[str, Any]) -> dict[str, float]:
    """State of our own, less the gradient, as entries of a parameter group."""
    numbers: dict[str, Any] = dict(zip(StepCounts._fields, own["counts"], strict=True))
    alignment = own["alignment"] or {}
    if all(isinstance(value, int | float) for value in alignment.values()):
        numbers |= alignment
    return {f"{OWN_STATE}_{name}": value for name, value in numbers.items()}


def without_numbers(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Parameter groups as the base optimizer knows them, and our own entries."""
    prefix = f"{OWN_STATE}_"
    numbers = {
        key.removeprefix(prefix): value
        for group in groups
        for key, value in group.items()
        if key.startswith(prefix)
    }
    bare = [{key: value for key, value in group.items() if not key.startswith(prefix)} for group in groups]
    return bare, numbers


def from_numbers(numbers: dict[str, float]) -> dict[str, Any] | None:
    """State of our own from what `without_numbers` found; `None` if that is nothing."""
    if not numbers:
        return None
    counts = [numbers[name] for name in StepCounts._fields]
    alignment = {name: value for name, value in numbers.items() if name not in StepCounts._fields}
    return {"counts": counts, "pulled": None, "pulled_age": 0, "alignment": alignment or None}
