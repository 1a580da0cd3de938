"""One forward pass on a safety batch that leaves no trace in the model.

Only the compared positions go through the output head: a pre-hook on the head drops the others inside
the model's own forward, for any architecture, so that (rows x length x vocabulary) is never made.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim._torch_private import buffers_of, is_compiled, version
from safegrad_optim.batches import Batch
from safegrad_optim.parallel import device_type, whole


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

    `ref` are hidden states of a reference and, if its head is not the model's, weight and bias of the head:
    their logits come last, after whatever the model does to its logits behind the head.
    """
    kept: list[Tensor] = []
    precision: list[str] = []

    def keep_positions(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.shape[:2] != mask.shape:
            raise RuntimeError(
                f"The output head got hidden states {tuple(hidden.shape)} for a batch of "
                f"{tuple(mask.shape)} tokens; they have to correspond one to one."
            )
        selected = hidden[mask.to(hidden.device)]
        kept.append(selected)
        if len(ref) == 1:
            selected = torch.cat([selected, ref[0].to(selected)])
        return (selected.unsqueeze(0), *args[1:])

    def add_reference(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        precision.append(f"hidden states {args[0].dtype}, logits {output.dtype}")
        if len(ref) < 2:
            return output
        hidden, *weights = (tensor.to(output.device) for tensor in ref)
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
        # Without a config the model is not of transformers and may know no cache.
        options = {"use_cache": False} if hasattr(model, "config") else {}
        logits = whole(model(**inputs, **options).logits)
    rows = int(mask.sum()) * (2 if ref else 1)
    if len(kept) != 1 or logits.shape[:-1] != (1, rows):
        raise RuntimeError(
            f"Expected logits of {rows} positions from one call of the head, found {tuple(logits.shape)} "
            f"from {len(kept)}. Pass the original of a model that is compiled or whose forward was replaced."
        )
    return Outputs(kept[0], logits.squeeze(0), precision[0])


@contextmanager
def unchanged_evaluation(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Run the model in eval mode and restore training flags, buffers and random state exactly.

    Autocast inside is off or to `autocast_dtype`, wherever the optimizer's step is called.
    """
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, version(buffer), buffer.clone())
        for module in model.modules()
        for name, buffer in buffers_of(module).items()
        if buffer is not None
    ]
    cuda = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(cuda), autocast(model, autocast_dtype):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, before, value in buffers:
                buffers_of(module)[name] = buffer
                if version(buffer) != before:
                    buffer.copy_(value)


def autocast(model: nn.Module, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast to `dtype` on the device the model is computed with, off where it is `None`."""
    device = device_type(next(model.parameters()))
    # Its cache would serve weights cast for the reference, without a graph, to model and training loop.
    return torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False)
