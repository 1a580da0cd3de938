"""What the examples measure: how often a model refuses, and how often it gets the task right."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from safegrad_optim import is_refusal

__all__ = ["generate", "refusal_rate", "task_accuracy"]


def refusal_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 12,
) -> tuple[float, list[str]]:
    """Share of prompts that the model refuses.

    The harmful score of a model is 1 - refusal_rate on unsafe requests; its over-refusal is
    refusal_rate on harmless ones.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: length of the replies; a refusal shows in its first words.

    Returns:
        The rate and the replies, in the order of the prompts.
    """
    replies = generate(model, tokenizer, prompts, max_new_tokens)
    return sum(map(is_refusal, replies)) / len(replies), replies


def task_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    max_new_tokens: int = 12,
) -> tuple[float, list[str]]:
    """Share of prompts that the model answers exactly as expected.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        answers: the expected replies.
        max_new_tokens: length of the replies; must exceed that of the longest answer, so that a
            longer reply does not pass for a right one.

    Returns:
        The accuracy and the replies, in the order of the prompts.
    """
    replies = generate(model, tokenizer, prompts, max_new_tokens)
    right = sum(reply == answer for reply, answer in zip(replies, answers, strict=True))
    return right / len(replies), replies


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 128,
    **options: Any,
) -> list[str]:
    """Greedy replies to user messages, each in a conversation of its own.

    Args:
        model: a causal language model; its train flag is restored.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: length limit of the replies.
        batch_size: prompts per batch.
        **options: further options of `model.generate`.

    Returns:
        The replies without special tokens and outer white space, in the order of the prompts.
    """
    if not prompts:
        raise ValueError("No prompts to reply to.")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    # The chat template has written the special tokens already.
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # System prompt and instruction open every prompt and are half of it: they run only once.
    prefix = _shared_prefix(encoded)[: min(map(len, encoded)) - 1]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    replies = [""] * len(encoded)
    training = model.training
    model.eval()
    # On a CPU, the product with a slice of the hidden states copies the head once for each prompt.
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].contiguous(), *args[1:])
    )
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            width = max(len(encoded[index]) for index in indices)
            # Padding goes between the shared prefix and the rest, which ends at the right edge.
            gaps = [width - len(encoded[index]) for index in indices]
            input_ids = [
                prefix + [tokenizer.pad_token_id] * gap + encoded[index][len(prefix) :]
                for index, gap in zip(indices, gaps, strict=True)
            ]
            attention_mask = [
                [1] * len(prefix) + [0] * gap + [1] * (width - gap - len(prefix)) for gap in gaps
            ]
            output = model.generate(
                input_ids=torch.tensor(input_ids, device=model.device),
                attention_mask=torch.tensor(attention_mask, device=model.device),
                past_key_values=_prefix_cache(model, prefix, len(indices)),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
            decoded = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, reply in zip(indices, decoded, strict=True):
                replies[index] = reply.strip()
    finally:
        handle.remove()
        model.train(training)
    return replies


def _shared_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that all sequences begin with."""
    columns = (set(column) for column in zip(*sequences, strict=False))
    return [column.pop() for column in takewhile(lambda column: len(column) == 1, columns)]


def _prefix_cache(model: PreTrainedModel, prefix: list[int], batch_size: int) -> Cache | None:
    """Keys and values of the tokens that open all prompts of a batch."""
    if not prefix:
        return None
    cache = model(torch.tensor([prefix], device=model.device), use_cache=True).past_key_values
    cache.batch_repeat_interleave(batch_size)
    return cache
