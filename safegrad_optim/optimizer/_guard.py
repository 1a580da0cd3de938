"""Who moves the parameters: an optimizer that is wrapped steps only from inside its wrapper."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from safegrad_optim._torch_private import hook_registry
from safegrad_optim.optimizer._checks import UnprotectedStepError
from safegrad_optim.optimizer._step import is_state_probe


@dataclass
class _GuardedStep:
    """The step of an optimizer without hooks."""

    guard: "StepGuard"
    base: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.guard(self.base)
        return type(self.base).step(self.base, *args, **options)


@dataclass
class StepGuard:
    """A hook of the base optimizer's step that refuses those which its wrapper does not take."""

    is_open: bool = False

    def __call__(self, base: Optimizer, *_: Any) -> None:
        grads = [parameter.grad for group in base.param_groups for parameter in group["params"]]
        # Without a gradient nothing moves.
        if self.is_open or all(grad is None for grad in grads) or is_state_probe(base, grads):
            return
        raise UnprotectedStepError(
            f"{type(base).__name__} was stepped by itself, past the SafeGradOptimizer that wraps it, so the "
            "step would have gone unprotected. Step the wrapper, and give it to whatever else steps "
            "(GradScaler, Trainer, Lightning); wrapper.unwrap() gives back one that steps by itself."
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let the base step for as long as the context lasts."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    def install(self, base: Optimizer) -> None:
        """Guard an optimizer, in the place of a wrapper that it had before."""
        self.remove(base)
        if isinstance(base, Optimizer):
            base.register_step_pre_hook(self)
        else:
            # schedulefree's wrapper, for example, has neither hooks nor what `Optimizer` itself reads.
            base.step = _GuardedStep(self, base)
            vars(base).setdefault("defaults", {})

    @staticmethod
    def remove(base: Optimizer) -> None:
        """Guard an optimizer no more."""
        if not isinstance(base, Optimizer):
            vars(base).pop("step", None)
            return
        registry = hook_registry(base, "step_pre")
        for key in [key for key, hook in registry.items() if isinstance(hook, StepGuard)]:
            del registry[key]
