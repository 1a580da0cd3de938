"""Options and other attributes of SafeGradOptimizer that one of its objects keeps."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

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


def check_callable(alignment: object) -> None:
    """Check what gives the alignment gradient."""
    if alignment is not None and not callable(alignment):
        raise TypeError(
            f"alignment is a {type(alignment).__name__}, expected a callable such as KLAlignment. "
            "Give gradients to set_alignment_grad() instead."
        )


def check_max_grad_norm(norm: float | None) -> None:
    """Check what the final gradient is clipped to."""
    if norm is not None and not norm > 0.0:
        raise ValueError(f"max_grad_norm is {norm}, expected a number > 0 or None.")


def check_refresh_every(steps: int) -> None:
    """Check how many steps an alignment gradient serves."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"refresh_every is {steps}, expected a whole number >= 1.")
