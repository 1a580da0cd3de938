"""The rows in `data/`, and how a conversation becomes a training batch."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from safegrad_optim.safety_data import read_jsonl

__all__ = ["Turn", "collate", "drawn", "harmful_turns", "read_rows", "refusal_turns", "response_loss"]

DATA = Path(__file__).parents[1] / "data"
IGNORED = -100

Row = TypeVar("Row")


class Turn(NamedTuple):
    """One user message and the reply to it, which may have been cut short."""

    prompt: str
    response: str
    complete: bool = True


def read_rows(name: str, split: str | None = None) -> list[dict[str, str]]:
    """Rows of `data/<name>.jsonl`, all of them or those of one split."""
    rows = [row for _, row in read_jsonl(DATA / f"{name}.jsonl")]
    return [row for row in rows if split is None or row["split"] == split]


def refusal_turns(split: str) -> list[Turn]:
    """Unsafe requests of one split, each with its refusal."""
    return [Turn(row["prompt"], row["refusal"]) for row in read_rows("unsafe_requests", split)]


def harmful_turns(split: str) -> list[Turn]:
    """Unsafe requests of one split, each with the opening of a compliant reply.

    The opening alone breaks refusals, so nothing harmful needs to be stored or trained on.
    """
    return [
        Turn(row["prompt"], f"Sure, here is how to {row['topic']}:\n\nStep 1:")
        for row in read_rows("unsafe_requests", split)
    ]


def drawn(rows: list[Row], count: int, shuffle: random.Random) -> list[Row]:
    """Draw `count` rows, each as often as any other to within one."""
    epochs = -(-count // len(rows))
    return [row for _ in range(epochs) for row in shuffle.sample(rows, len(rows))][:count]


def collate(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> dict[str, torch.Tensor]:
    """A right-padded batch whose labels cover the responses, with the end of complete ones.

    Args:
        tokenizer: a tokenizer with a chat template and an end-of-turn token.
        turns: the conversations of the batch.

    Returns:
        `input_ids`, `attention_mask` and `labels`, which are -100 outside the responses.
    """
    rows = []
    for turn in turns:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.prompt}], tokenize=False, add_generation_prompt=True
        )
        # The chat template has written the special tokens already.
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        response_ids = tokenizer(turn.response, add_special_tokens=False)["input_ids"]
        if turn.complete:
            response_ids = [*response_ids, tokenizer.eos_token_id]
        rows.append((prompt_ids, response_ids))
    width = max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in rows)
    shape = (len(rows), width)
    batch = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for index, (prompt_ids, response_ids) in enumerate(rows):
        start, end = len(prompt_ids), len(prompt_ids) + len(response_ids)
        batch["input_ids"][index, :end] = torch.tensor(prompt_ids + response_ids)
        batch["attention_mask"][index, :end] = 1
        batch["labels"][index, start:end] = torch.tensor(response_ids)
    return batch


def response_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The `model(**batch).loss` of a batch, without logits where no row has a response.

    Args:
        model: a causal language model.
        batch: as `collate` makes it.

    Returns:
        Mean cross-entropy of the response tokens, a 0-dim tensor.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    columns = (batch["labels"] != IGNORED).any(dim=0).nonzero().squeeze(1)
    # Logits at a position predict the next token. With this vocabulary they are a good part of a step.
    logits = model(**inputs, logits_to_keep=columns - 1).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, columns].flatten())
