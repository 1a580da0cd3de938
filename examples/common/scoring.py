"""What the examples measure: how often a model refuses, and how often it gets the task right."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from safegrad_optim.safety_data import greedy_tokens, is_refusal

__all__ = ["generate", "refusal_rate", "task_accuracy"]

BATCH_SIZE = 128


def refusal_rate(
    model: nn.Module,
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
    model: nn.Module,
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


def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Greedy replies to user messages, each in a conversation of its own.

    Args:
        model: a causal language model, adapters included; its train flags are restored.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: length limit of the replies.

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
    replies = greedy_tokens(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=BATCH_SIZE)
    return [reply.strip() for reply in tokenizer.batch_decode(replies, skip_special_tokens=True)]
