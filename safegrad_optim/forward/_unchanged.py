"""Passes through a model that leave no trace in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim._torch_private import buffers_of, version
from safegrad_optim.forward._randomness import switch_off
from safegrad_optim.parallel import device_type, is_distributed_tensor

# What every module has, but for its submodules, which some models replace.
_NOT_PLAIN = {*vars(nn.Module())} - {"_modules"}


@contextmanager
def unchanged_evaluation(model: nn.Module) -> Iterator[None]:
    """Run the model as in eval mode, for replies, and leave it as it was."""
    with _unchanged(model):
        for module in model.modules():
            # Not eval(), in which some merge their adapters or pack their weights.
            module.training = False
        yield


@contextmanager
def unchanged_training(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the model as in training, but for all that draws random numbers, and leave it as it was.

    Not in eval mode: there some models take a path without a graph, or pack their weights, and checkpoint
    nothing. Autocast inside is off or to `autocast_dtype`, wherever the optimizer's step is called.
    """
    with _unchanged(model), autocast(model, autocast_dtype):
        for module in model.modules():
            module.training = True
        switch_off(model)
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    attributes = [*map(_Attributes, _with_attributes(model))]
    buffers = [
        (module, name, buffer, version(buffer), buffer.clone())
        for module in model.modules()
        for name, buffer in buffers_of(module).items()
        if buffer is not None
    ]
    weights = [
        (name, tensor, version(tensor))
        for name, tensor in model.named_parameters()
        # FSDP2 writes to what it gathers.
        if not is_distributed_tensor(tensor)
    ]
    cuda = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(cuda):
            yield
        _require_unwritten(weights)
    finally:
        for kept in attributes:
            kept.put_back()
        with torch.no_grad():
            for module, name, buffer, before, value in buffers:
                buffers_of(module)[name] = buffer
                if version(buffer) != before:
                    buffer.copy_(value)


def _require_unwritten(weights: list[tuple[str, Tensor, int]]) -> None:
    written = [name for name, tensor, before in weights if version(tensor) != before]
    if written:
        raise RuntimeError(
            f"A forward pass wrote to {len(written)} parameters (first: {written[0]}), so a pass on safety "
            "batches changes the model. Load it anew, and give one whose forward leaves its weights alone."
        )


def _with_attributes(model: nn.Module) -> list[Any]:
    """The modules of a model and their configs, each once."""
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config"))}
    return [*model.modules(), *(config for config in configs.values() if hasattr(config, "__dict__"))]


class _Attributes:
    """The plain attributes of an object, in which some models keep what they have seen (dynamic RoPE)."""

    def __init__(self, owner: Any) -> None:
        self._now: dict[str, Any] = vars(owner)
        self._before = dict(self._now)
        self._contents = [
            (value, value.copy())
            for name, value in self._before.items()
            if type(value) in (list, dict, set) and name not in _NOT_PLAIN
        ]

    def put_back(self) -> None:
        for name in self._now.keys() - self._before.keys():
            del self._now[name]
        for name, value in self._before.items():
            if name not in self._now or self._now[name] is not value:
                self._now[name] = value
        for value, before in self._contents:
            if not _same(value, before):
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)


def _same(one: Any, other: Any) -> bool:
    """Whether containers hold the same objects; tensors in them are not compared."""
    if len(one) != len(other):
        return False
    if isinstance(one, Mapping):
        return all(name in one and one[name] is value for name, value in other.items())
    if isinstance(one, set):
        return bool(one == other)
    return all(left is right for left, right in zip(one, other, strict=True))


def autocast(model: nn.Module, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast to `dtype` on the device the model is computed with, off where it is `None`."""
    device = device_type(next(model.parameters()))
    # Its cache would serve weights cast for the reference, without a graph, to model and training loop.
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
