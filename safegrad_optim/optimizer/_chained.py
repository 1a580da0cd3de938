"""Several optimizers as one, such as Muon for the matrices and AdamW for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safegrad_optim._torch_private import make_hook_registries


class ChainedOptimizer(Optimizer):
    """Step several optimizers as one, with all their parameter groups, so that one wrapper protects them.

    Each `SafeGradOptimizer` decides on the conflict of its own parameters and draws its own safety batches,
    where the method has one decision over all:

        SafeGradOptimizer(ChainedOptimizer(Muon(matrices), AdamW(others)), alignment)

    Schedulers, checkpoints and hooks see one optimizer; its state is that of all.

    Args:
        optimizers: at least one; their parameters are disjoint.

    Raises:
        ValueError: there are none, or a parameter is in two of them.
        TypeError: one is no optimizer.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ValueError("There are no optimizers to chain. Give at least one.")
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"A {type(optimizer).__name__} was given, expected torch.optim.Optimizer.")
        parameters = [
            tensor for one in optimizers for group in one.param_groups for tensor in group["params"]
        ]
        twice = len(parameters) - len(set(parameters))
        if twice:
            raise ValueError(f"{twice} parameters are in two of the optimizers. Give each to one.")
        self.optimizers = optimizers
        # Makes the hook registries; Optimizer.__init__ would set groups and state.
        make_hook_registries(self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups themselves, in the order of the optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The state of each parameter that has one."""
        return {tensor: entry for optimizer in self.optimizers for tensor, entry in optimizer.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """What the optimizers have in common, with the values of the first."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {name: value for name, value in first.items() if all(name in other for other in others)}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of each optimizer; `closure` is evaluated once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, because it does not say to which optimizer."""
        raise NotImplementedError("Call add_param_group() of one of .optimizers, then chain them anew.")

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizers" in state:
            self.optimizers = state["optimizers"]
            make_hook_registries(self)
        # What Optimizer.load_state_dict has made of a saved state.
        groups = iter(state.get("param_groups", ()))
        for optimizer in self.optimizers if "param_groups" in state else ():
            own = [next(groups) for _ in optimizer.param_groups]
            tensors = [tensor for group in own for tensor in group["params"]]
            entries = {tensor: state["state"][tensor] for tensor in tensors if tensor in state["state"]}
            optimizer.__setstate__({"state": entries, "param_groups": own})
