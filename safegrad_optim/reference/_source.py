"""Where P_ref comes from: adapters switched off, a frozen second model, or the model as it is now."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from safegrad_optim._peft_private import adapter_parameters, is_merged


class ReferenceSource:
    """A model that P_ref is computed from."""

    shares_head = True
    """Whether its output head is that of the model, which then gives its logits back from hidden states."""
    drifts = False
    """Whether fine-tuning changes it, so that it has to be kept before."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """Give the model that is the reference for as long as the context lasts."""
        yield self.model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name the parameters that make the reference what it is."""
        return self.model.named_parameters()


class CurrentModel(ReferenceSource):
    """The model as it is now, to be kept before fine-tuning changes it."""

    drifts = True


class FrozenModel(ReferenceSource):
    """A second model, which may not share a trainable parameter with the one being trained."""

    shares_head = False

    def __init__(self, ref_model: nn.Module, model: nn.Module) -> None:
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        shared = [name for name, tensor in ref_model.named_parameters() if tensor in trained]
        if shared:
            raise ValueError(
                f"The reference shares {len(shared)} trainable parameters with the model (first: "
                f"{shared[0]}), so it would drift along with it. Give a copy.deepcopy of the model made "
                "before training, or leave ref_model out to cache the model as it is now."
            )
        super().__init__(ref_model)


class AdaptersOff(ReferenceSource):
    """The base model under PEFT adapters: the aligned model as long as only adapters are trained.

    Merged adapters, or trainable parameters outside the adapters, raise a ValueError at each use.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._check()

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        self._check()
        # Switching adapters on again makes all of them trainable, also those the user froze.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():  # type: ignore[operator]
                # Off makes none trainable, which FSDP2 would note for good at its first forward.
                _restore(flags)
                yield self.model
        finally:
            _restore(flags)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        adapters = adapter_parameters(self.model)
        return (pair for pair in self.model.named_parameters() if pair[1] not in adapters)

    def _check(self) -> None:
        advice = "or give a frozen copy of the aligned model as Reference(ref_model=...)."
        merged = [name for name, module in self.model.named_modules() if is_merged(module)]
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


def reference_source(model: nn.Module, ref_model: nn.Module | None = None) -> ReferenceSource:
    """Return the second model if there is one, else the model without its PEFT adapters, else as it is."""
    if ref_model is not None:
        return FrozenModel(ref_model, model)
    has_adapters = hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
    return AdaptersOff(model) if has_adapters else CurrentModel(model)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
