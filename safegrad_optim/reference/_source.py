"""Where P_ref comes from: adapters switched off, a frozen second model, or the model as it is now."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor, nn


class ReferenceSource(Protocol):
    """What P_ref is computed from."""

    shares_head: bool
    """Whether its output head is that of the model, which then gives its logits back from hidden states."""
    drifts: bool
    """Whether fine-tuning changes it, so that it has to be kept before."""

    def open(self) -> AbstractContextManager[nn.Module]:
        """Give the model that is the reference for as long as the context lasts."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name the parameters that make the reference what it is."""
        ...


def reference_source(model: nn.Module, ref_model: nn.Module | None = None) -> ReferenceSource:
    """Return the second model if there is one, else the model without its PEFT adapters, else as it is."""
    if ref_model is not None:
        return FrozenModel(ref_model, model)
    has_adapters = hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
    return AdaptersOff(model) if has_adapters else CurrentModel(model)


class AdaptersOff:
    """The base model under PEFT adapters: the aligned model as long as only adapters are trained.

    Args:
        model: a `PeftModel`, whose base model is the aligned model.

    Raises:
        ValueError: on construction and at each use, where switching the adapters off would not give
            the aligned model back: merged adapters, or trainable parameters outside the adapters.
    """

    shares_head = True
    drifts = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._check()

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        self._check()
        # Switching adapters on again makes all of them trainable, also those the user froze.
        flags: list[tuple[Tensor, bool]] = [
            (parameter, parameter.requires_grad) for parameter in self.model.parameters()
        ]
        try:
            with self.model.disable_adapter():  # type: ignore[operator]
                # Off makes none trainable, which FSDP2 would note for good at its first forward.
                _restore(flags)
                yield self.model
        finally:
            _restore(flags)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        adapters = self._adapter_parameters()
        return (pair for pair in self.model.named_parameters() if pair[1] not in adapters)

    def _adapter_parameters(self) -> set[Tensor]:
        found: set[Tensor] = set()
        for module in self.model.modules():
            for name in getattr(module, "adapter_layer_names", ()):
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    found.update(part.parameters())
                elif isinstance(part, nn.Parameter):
                    found.add(part)
        return found

    def _check(self) -> None:
        advice = "or give a frozen copy of the aligned model as Reference(ref_model=...)."
        merged = [name for name, module in self.model.named_modules() if _is_merged(module)]
        if merged:
            raise ValueError(
                f"Adapters are merged into {len(merged)} layers (first: {merged[0]}), so switching them "
                f"off does not give the aligned model back. Call unmerge_adapter() first, {advice}"
            )
        trained = [name for name, tensor in self.named_parameters() if tensor.requires_grad]
        if trained:
            raise ValueError(
                f"{len(trained)} trainable parameters are outside the adapters (first: {trained[0]}), so "
                "switching adapters off will not give the aligned model back. Freeze them (no "
                f"modules_to_save, bias='none'), {advice}"
            )


class FrozenModel:
    """A second model, frozen: the aligned model before fine-tuning.

    Args:
        ref_model: the aligned model; it is put in eval mode while it is used.
        model: the model being trained.

    Raises:
        ValueError: the two share a trainable parameter, so the reference would train along.
    """

    shares_head = False
    drifts = False

    def __init__(self, ref_model: nn.Module, model: nn.Module) -> None:
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        shared = [name for name, tensor in ref_model.named_parameters() if tensor in trained]
        if shared:
            raise ValueError(
                f"The reference shares {len(shared)} trainable parameters with the model (first: "
                f"{shared[0]}), so it would drift along with it. Give a copy.deepcopy of the model made "
                "before training, or leave ref_model out to cache the model as it is now."
            )
        self.ref_model = ref_model

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        yield self.ref_model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.ref_model.named_parameters()


class CurrentModel:
    """The model as it is now, to be cached before fine-tuning changes it.

    Args:
        model: the aligned model that is about to be fine-tuned.
    """

    shares_head = True
    drifts = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        yield self.model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.named_parameters()


def _restore(flags: list[tuple[Tensor, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _is_merged(module: nn.Module) -> bool:
    return bool(getattr(module, "merged", False)) and hasattr(module, "adapter_layer_names")
