"""A model's own replies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from safegrad_optim.forward import output_head, unchanged_evaluation
from safegrad_optim.progress import shown


@torch.no_grad()
def greedy_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> list[list[int]]:
    """Continue each prompt greedily, through an end of text of model or tokenizer; the model stays as it was.

    `progress` is the text of a progress bar, which is shown if tqdm is installed.
    """
    own: Any = getattr(model, "generation_config", None)
    stop = getattr(own, "eos_token_id", None)
    ends = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    limits = {"max_new_tokens": max_new_tokens, "eos_token_id": sorted(ends) or None, "pad_token_id": 0}
    greedy = {"do_sample": False, "num_beams": 1, "use_cache": True}
    generate: Any = model.generate
    device = next(model.parameters()).device
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, list[int]] = {}
    # On a CPU, the product with a slice of the hidden states copies the head once for each prompt.
    hook = output_head(model).register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    with hook, unchanged_evaluation(model):
        if own is not None:
            # A chat model's own may sample, search, penalise, suppress or force tokens.
            model.generation_config = type(own)()
        for start in shown(range(0, len(order), batch_size), progress):
            indices = order[start : start + batch_size]
            rows = [torch.tensor(prompts[index], dtype=torch.long, device=device) for index in indices]
            ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
            mask = ids >= 0
            output = generate(input_ids=ids * mask, attention_mask=mask.long(), **limits, **greedy)
            for index, tokens in zip(indices, output[:, ids.shape[1] :].tolist(), strict=True):
                lengths = (n for n, token in enumerate(tokens, start=1) if token in ends)
                found[index] = tokens[: next(lengths, None)]
    return [found[index] for index in range(len(prompts))]
