"""Passes through a model that leave no trace in it."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from safegrad_optim._torch_private import (
    buffers_of,
    is_plain_layer,
    parameters_of,
    parts_of,
    version,
)
from safegrad_optim.forward._randomness import switch_off
from safegrad_optim.parallel import device_type, is_distributed_tensor

# What every module has, but for its submodules, which some models replace.
_NOT_PLAIN = {*vars(nn.Module())} - {"_modules"}
_CONTAINERS = {list, dict, set}


@contextmanager
def unchanged_evaluation(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the model as in eval mode, for replies, and leave it as it was; autocast as in training."""
    modules = [*model.modules()]
    with _unchanged(model, modules), autocast(model, autocast_dtype):
        # Not eval(), in which some merge their adapters; and some pack their weights where they see the mode.
        _set_modes(modules, map(_packs_weights, modules))
        yield


@contextmanager
def unchanged_training(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the model as in training, but for all that draws random numbers, and leave it as it was.

    Not in eval mode: there some models take a path without a graph, or pack their weights, and checkpoint
    nothing. Autocast inside is off or to `autocast_dtype`, wherever the optimizer's step is called.
    """
    modules = [*model.modules()]
    with _unchanged(model, modules), autocast(model, autocast_dtype):
        _set_modes(modules, repeat(True))
        switch_off(modules)
        yield


@contextmanager
def _unchanged(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    modes = [module.training for module in modules]
    attributes = [*map(_Attributes, _with_attributes(modules))]
    buffers = [
        (module, name, buffer, version(buffer), buffer.clone())
        for module in modules
        for name, buffer in buffers_of(module).items()
        if buffer is not None
    ]
    parameters = {
        tensor for module in modules for tensor in parameters_of(module).values() if tensor is not None
    }
    # FSDP2 writes to what it gathers.
    weights = [(tensor, _state(tensor)) for tensor in parameters if not is_distributed_tensor(tensor)]
    cuda = {tensor.device for tensor in parameters if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(cuda):
            yield
        _require_unwritten(model, {tensor for tensor, before in weights if _state(tensor) != before})
    finally:
        for kept in attributes:
            kept.put_back()
        _set_modes(modules, modes)
        with torch.no_grad():
            for module, name, buffer, before, value in buffers:
                buffers_of(module)[name] = buffer
                if version(buffer) != before:
                    buffer.copy_(value)


def _packs_weights(module: nn.Module) -> bool:
    """Whether a module may pack its weights past training in an eval pass: bitsandbytes', on some CPUs."""
    return type(module).__module__.startswith("bitsandbytes.")


def _state(weight: Tensor) -> tuple[int, list[int]]:
    """What a write to a weight, or other memory in its place, changes."""
    return version(weight), [part.data_ptr() for part in parts_of(weight)]


def _set_modes(modules: Iterable[nn.Module], modes: Iterable[bool]) -> None:
    for module, mode in zip(modules, modes, strict=False):
        # Past __setattr__, which takes longer than all else here.
        vars(module)["training"] = mode


def _require_unwritten(model: nn.Module, written: set[Tensor]) -> None:
    if written:
        first = next(name for name, tensor in model.named_parameters() if tensor in written)
        raise RuntimeError(
            f"A forward pass wrote to {len(written)} parameters (first: {first}): safety batches change the "
            "model. Load it anew, and give one whose forward leaves its weights alone."
        )


def _with_attributes(modules: Sequence[nn.Module]) -> list[Any]:
    """What may note in plain attributes what it has seen: modules of models, and their configs, each once."""
    own = [module for module in modules if not is_plain_layer(module)]
    configs = {
        id(config): config for module in own if hasattr(config := vars(module).get("config"), "__dict__")
    }
    return [*own, *configs.values()]


class _Attributes:
    """The plain attributes of an object, in which some models keep what they have seen (dynamic RoPE)."""

    def __init__(self, owner: Any) -> None:
        self._now: dict[str, Any] = vars(owner)
        self._before = dict(self._now)
        self._contents = [
            (value, value.copy())
            for name, value in self._before.items()
            if type(value) in _CONTAINERS and name not in _NOT_PLAIN
        ]

    def put_back(self) -> None:
        now, before = self._now, self._before
        # All at once: most are as they were, and a model has thousands of them.
        if now.keys() != before.keys() or not all(map(operator.is_, now.values(), before.values())):
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        for value, contents in self._contents:
            if not _same(value, contents):
                value.clear()
                value.extend(contents) if isinstance(value, list) else value.update(contents)


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
