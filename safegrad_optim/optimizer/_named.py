"""Gradients given by parameter or by name, put in the order of the parameters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def in_order(
    grads: Mapping[Any, Tensor | None],
    parameters: Sequence[Tensor],
    named_parameters: Iterable[tuple[str, Tensor]],
) -> list[Tensor | None]:
    """Return the gradient of each parameter.

    Args:
        grads: by parameter, or by name.
        parameters: what gradients are wanted of.
        named_parameters: their names, for gradients by name.

    Raises:
        ValueError: a parameter has no gradient, no name, or a gradient belongs to none.
    """
    keys: Sequence[Any] = parameters
    if any(isinstance(key, str) for key in grads):
        names = {parameter: name for name, parameter in named_parameters}
        for index, parameter in enumerate(parameters):
            if parameter not in names:
                raise ValueError(
                    f"Parameter {index} of shape {tuple(parameter.shape)} has no name. Pass "
                    "named_parameters=model.named_parameters(), from the model being optimized."
                )
        keys = [names[parameter] for parameter in parameters]
    expected = set(keys)
    missing = [_shown(key) for key in keys if key not in grads]
    unknown = [_shown(key) for key in grads if key not in expected]
    if missing or unknown:
        raise ValueError(
            f"Alignment gradients miss {len(missing)} parameters {missing[:3]} and have {len(unknown)} "
            f"unknown ones {unknown[:3]}. Give one entry (a tensor or None) per trainable parameter."
        )
    return [grads[key] for key in keys]


def named(param_groups: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield what an optimizer that was built from named parameters knows of their names."""
    for group in param_groups:
        yield from zip(group.get("param_names", ()), group["params"], strict=False)


def _shown(key: Any) -> str:
    return f"of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
