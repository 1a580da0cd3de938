"""What a model gives at some positions of a batch, and nothing of the others.

Only the compared positions go through the output head: a pre-hook on the head drops the others inside
the model's own forward, for any architecture, so that (rows x length x vocabulary) is never made.
"""

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim._peft_private import virtual_tokens
from safegrad_optim._torch_private import is_compiled
from safegrad_optim.batches import Batch
from safegrad_optim.parallel import whole

# Taken through **kwargs by models of transformers, and by no name in their signature.
_THROUGH_KWARGS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class Outputs(NamedTuple):
    """What a model gives at the kept positions of a batch."""

    hidden: Tensor  # before the head, (tokens, hidden size)
    logits: Tensor  # as the model returns them, (tokens, vocabulary)
    precision: str  # dtypes at the head: afterwards accelerate makes the logits of what it prepared fp32


def output_head(model: nn.Module) -> nn.Module:
    """Return the module that maps final hidden states to logits."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder; the alignment loss is for decoder-only language "
            "models. Pass your own callable as alignment."
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(model).__name__} has no output head: get_output_embeddings() is missing or gives "
            f"{type(head).__name__}. Use a causal language model, or pass your own callable as alignment."
        )
    return head


def forward_at(model: nn.Module, inputs: Batch, mask: Tensor, ref: tuple[Tensor, ...] = ()) -> Outputs:
    """Run the model and return what it gives at the positions of `mask`, (rows, length) bool, only.

    Inputs and mask are on the CPU: which positions are kept is then known without a wait for the device.
    `ref` are hidden states of a reference and, if its head is not the model's, weight and bias of the head:
    their logits come last, after whatever the model does to its logits behind the head.
    """
    # Virtual tokens stand before all others.
    mask = nn.functional.pad(mask, (virtual_tokens(model), 0))
    places = mask.flatten().nonzero().squeeze(1)
    kept: list[Tensor] = []
    precision: list[str] = []

    def keep_positions(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.shape[:2] != mask.shape:
            raise RuntimeError(
                f"The output head got hidden states {tuple(hidden.shape)} for a batch of "
                f"{tuple(mask.shape)} tokens; they have to correspond one to one."
            )
        selected = hidden.flatten(0, 1).index_select(0, sent(places, hidden.device))
        kept.append(selected)
        if len(ref) == 1:
            selected = torch.cat([selected, sent(ref[0], selected.device).to(selected.dtype)])
        return (selected.unsqueeze(0), *args[1:])

    def add_reference(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        precision.append(f"hidden states {args[0].dtype}, logits {output.dtype}")
        if len(ref) < 2:
            return output
        hidden, *weights = (sent(tensor, output.device) for tensor in ref)
        with torch.no_grad():
            ref_logits = nn.functional.linear(hidden.unsqueeze(0), *weights)
        return torch.cat([output, ref_logits], dim=1)

    head = output_head(model)
    with ExitStack() as stack:
        # First, before tensor parallelism makes a DTensor of what comes in.
        stack.enter_context(head.register_forward_pre_hook(keep_positions, prepend=True))
        stack.enter_context(head.register_forward_hook(add_reference))
        if is_compiled(model):
            # The hooks are new in each call, and would recompile it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        device = next(model.parameters()).device
        inputs = {name: sent(value, device) for name, value in inputs.items()}
        logits = whole(model(**_taken(model, inputs)).logits)
    rows = len(places) * (2 if ref else 1)
    if len(kept) != 1 or logits.shape[:-1] != (1, rows):
        raise RuntimeError(
            f"Expected logits of {rows} positions from one call of the head, found {tuple(logits.shape)} "
            f"from {len(kept)}. Pass the original of a model that is compiled or whose forward was replaced; "
            "one that runs its head several times a pass, as X-LoRA's, wants an alignment of your own."
        )
    return Outputs(kept[0], logits.squeeze(0), precision[0])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, where the host need not wait for what is there already."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def require_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse fields of safety rows that the forward of a causal language model does not take."""
    output_head(model)
    known, takes_more = _inputs_of(model)
    if takes_more and not (known and hasattr(model, "config")):
        return
    always = {"labels", "attention_mask"} | (_THROUGH_KWARGS if takes_more else set())
    unknown = sorted({*names} - known - always)
    if unknown:
        raise ValueError(
            f"The safety rows have {unknown}, which the forward of {type(_inner(model)).__name__} does not "
            "take. Remove these columns."
        )


def _taken(model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """The inputs that a model takes, and no cache."""
    known, takes_more = _inputs_of(model)
    if "attention_mask" not in known and not takes_more:
        # Padding is on the right, where causal models do not look.
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    # Without a config the model is not of transformers and may know no cache.
    without_cache = "use_cache" in known or (takes_more and hasattr(model, "config"))
    return {**inputs, "use_cache": False} if without_cache else inputs


def _inputs_of(model: nn.Module) -> tuple[set[str], bool]:
    """Names that the forward of a model takes, and whether it takes others too."""
    parameters = inspect.signature(_inner(model).forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {parameter.name for parameter in parameters if parameter.kind in named}
    return known, any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _inner(model: nn.Module) -> nn.Module:
    """The model that PEFT hands everything on to."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return getattr(base, "_orig_mod", base)
