"""Is the model one function: the same at each pass, and in training what it is in eval mode."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim.batches import Batch
from safegrad_optim.divergence import kl_divergence
from safegrad_optim.forward._outputs import forward_at
from safegrad_optim.forward._unchanged import unchanged_evaluation, unchanged_training
from safegrad_optim.parallel import on_any_rank

# In nats a token. Two passes of one function have the same bits, but where a kernel adds in any order.
_MOST = 1e-4


class _Call(NamedTuple):
    """A call of a module, by sums that tell whether it is the same as another."""

    name: str
    of_inputs: float
    of_outputs: float


@torch.no_grad()
def require_one_function(
    model: nn.Module, inputs: Batch, mask: Tensor, autocast_dtype: torch.dtype | None
) -> None:
    """Refuse a model that is random, or another in eval mode, with all known randomness off.

    Raises:
        ValueError: it is; with the name of the module that begins it.
    """

    def trained(seed: int) -> Tensor:
        with unchanged_training(model, autocast_dtype):
            torch.manual_seed(seed)
            return forward_at(model, inputs, mask).logits

    def evaluated(seed: int) -> Tensor:
        with unchanged_evaluation(model, autocast_dtype):
            torch.manual_seed(seed)
            return forward_at(model, inputs, mask).logits

    first = trained(0)
    others: dict[str, Callable[[], Tensor]] = {
        "at each pass": lambda: trained(1),
        "in eval mode than in training": lambda: evaluated(0),
    }
    for where, other in others.items():
        difference = float(kl_divergence(first, other())) / len(first)
        if on_any_rank(not difference <= _MOST):
            place = _first_difference(model, lambda: trained(0), other)
            raise ValueError(
                f"The model gives other logits {where}, though dropout and its kin are off: KL = "
                f"{difference:.3g} a token, from {place} on. So it cannot be compared with a reference. "
                "Switch off there what draws random numbers, or what depends on the mode."
            )


def _first_difference(model: nn.Module, one: Callable[[], Any], other: Callable[[], Any]) -> str:
    """The innermost module that gives something else for the same inputs, by name and class."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    for left, right in zip(_calls(model, one), _calls(model, other), strict=False):
        if left.of_inputs == right.of_inputs and left.of_outputs != right.of_outputs:
            return f"{left.name or 'the model'} ({classes[left.name]})"
    return "a place between its modules"


def _calls(model: nn.Module, run: Callable[[], Any]) -> list[_Call]:
    calls: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, output: calls.append(_Call(name, _sum(args), _sum(output)))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_hook(note(name)))
        run()
    return calls


def _sum(values: Any) -> float:
    if isinstance(values, Tensor):
        return float(values.double().sum()) if values.is_floating_point() else 0.0
    return sum(map(_sum, values)) if isinstance(values, (tuple, list)) else 0.0
