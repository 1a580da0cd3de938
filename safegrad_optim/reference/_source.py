"""Where P_ref comes from: adapters switched off, a frozen second model, or the model as it is now."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from safegrad_optim._peft_private import adapter_parameters, inits_that_move_weights, is_merged
from safegrad_optim.batches import Part
from safegrad_optim.forward import Outputs, forward_at, output_head, unchanged_training
from safegrad_optim.parallel import synchronized

Cache = Literal["exact", "hidden", "logits", "top_k"]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where P_ref comes from, and where it is kept.

    By default it is the model with its PEFT adapters switched off, or, without adapters, the model as it is
    when the alignment is built; computed once and kept exactly, on the CPU.

    Args:
        ref_model: a frozen aligned model instead.
        cache: what is kept of each token. "hidden", the final hidden state and a copy of the output head
            where that is trained, and "logits" are exact; "exact" is the smaller of the two. "top_k" keeps
            `top_k` log-probabilities, see `top_k_kl_divergence`; `None` computes P_ref anew at each call.
        top_k: number of log-probabilities that "top_k" keeps.
        file: safetensors file to keep the cache in; read by memory map if it exists and fits.
        resumed: the model has been fine-tuned already and may differ from its reference; without adapters
            this needs the `file` of the run that is resumed, or `ref_model`.
        trained_here: the model was trained in this process, and is the aligned model as it is now.

    Raises:
        ValueError: `cache` is unknown, or is `None` with a `file`.
    """

    ref_model: nn.Module | None = None
    cache: Cache | None = "exact"
    top_k: int = 128
    file: str | PathLike[str] | None = None
    resumed: bool = False
    trained_here: bool = False

    def __post_init__(self) -> None:
        if self.cache not in (None, *get_args(Cache)):
            raise ValueError(f"cache is {self.cache!r}, expected one of {get_args(Cache)} or None.")
        if self.cache is None and self.file is not None:
            raise ValueError("file is given but cache=None keeps nothing. Leave out one of them.")


@dataclass
class ReferenceSource:
    """A model that P_ref is computed from."""

    model: nn.Module
    shares_head: bool = True  # with the model, which then gives its logits back from hidden states
    drifts: bool = False  # fine-tuning changes it, so that it has to be kept before

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        """Give the model that is the reference for as long as the context lasts."""
        yield self.model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name the parameters that make the reference what it is."""
        return self.model.named_parameters()

    @torch.no_grad()
    def outputs(self, part: Part, autocast_dtype: torch.dtype | None) -> Outputs:
        """Return what the reference gives at the compared positions of a part."""
        with self.open() as model, synchronized(model), unchanged_training(model, autocast_dtype):
            return forward_at(model, part.inputs, part.mask)


class AdaptersOff(ReferenceSource):
    """The base model under PEFT adapters: the aligned one while only they are trained, as each use checks."""

    @contextmanager
    def open(self) -> Iterator[nn.Module]:
        self.check()
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

    def check(self) -> None:
        """Check that the model without its adapters is the aligned one."""
        advice = "or give a frozen copy of the aligned model as Reference(ref_model=...)."
        moved = inits_that_move_weights(self.model)
        if moved:
            raise ValueError(
                f"Adapters initialised by {moved[0]!r} (PiSSA and its kin) hold a part of the base weights; "
                "without them the model is not the aligned one. Give a frozen copy of the model as it was "
                "before get_peft_model() as Reference(ref_model=...)."
            )
        merged = [name for name, module in self.model.named_modules() if is_merged(module)]
        if merged:
            raise ValueError(
                f"Adapters are merged into {len(merged)} layers (first: {merged[0]}), so switching them off "
                f"does not give the aligned model back. Call unmerge_adapter() first, {advice}"
            )
        trained = [name for name, tensor in self.named_parameters() if tensor.requires_grad]
        if trained:
            raise ValueError(
                f"{len(trained)} trainable parameters are outside the adapters (first: {trained[0]}), which "
                f"alone are switched off. Freeze them (no modules_to_save, bias='none'), {advice}"
            )


def reference_source(model: nn.Module, ref_model: nn.Module | None = None) -> ReferenceSource:
    """Return the second model if there is one, else the model without its PEFT adapters, else as it is."""
    if ref_model is not None:
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        shared = [name for name, tensor in ref_model.named_parameters() if tensor in trained]
        if shared:
            raise ValueError(
                f"The reference shares {len(shared)} trainable parameters with the model, first {shared[0]}. "
                "Give a copy.deepcopy made before training, or leave ref_model out to keep the model as is."
            )
        _require_one_vocabulary(model, ref_model)
        return ReferenceSource(ref_model, shares_head=False)
    if hasattr(model, "peft_config") and hasattr(model, "disable_adapter"):
        adapters_off = AdaptersOff(model)
        adapters_off.check()
        return adapters_off
    return ReferenceSource(model, drifts=True)


def _require_one_vocabulary(model: nn.Module, ref_model: nn.Module) -> None:
    own, ref = (len(next(output_head(each).parameters())) for each in (model, ref_model))
    if own != ref:
        raise ValueError(
            f"The model has a vocabulary of {own} tokens and ref_model one of {ref}. Resize both alike "
            "(resize_token_embeddings) before building KLAlignment, or leave ref_model out."
        )


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
