"""What the quickstart reads: the model, rows to train on, and rows to judge by."""

import argparse
import random
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import Turn, collate, drawn, harmful_turns, read_rows, refusal_turns
from common.own_data import check_responses, read_texts, split_off
from common.smollm2 import load_aligned, load_model
from safegrad_optim import shipped_requests

__all__ = ["Data", "batches", "load", "read_data"]


class Data(NamedTuple):
    """Everything the run reads: rows to train on, rows to stay safe by, rows to judge by."""

    user: list[Turn]
    rows: list[Turn]
    requests: list[dict[str, str]]
    task: list[Turn]
    unsafe: list[Turn]
    lookalikes: list[str]


def read_data(args: argparse.Namespace) -> Data:
    if args.user_data is None:
        user = [Turn(row["prompt"], row["response"]) for row in read_rows("tickets", "train")]
        task = [Turn(row["prompt"], row["response"]) for row in read_rows("tickets", "evaluation")]
    else:
        rows = read_texts(args.user_data, ("prompt", "response"))
        user, task = split_off([Turn(row["prompt"], row["response"]) for row in rows], args.user_data)
    if args.safety_data is None:
        # Every fourth, for these are the minutes on a CPU before training starts.
        requests = shipped_requests()[::4]
    else:
        requests = read_texts(args.safety_data, ("request", "lookalike"))
    unsafe = refusal_turns("evaluation")
    if args.eval_data is not None:
        # Only their prompts are judged; KL to the reference is taken on a generic refusal.
        unsafe = [
            Turn(row["prompt"], "I'm sorry, but I can't help with that.")
            for row in read_texts(args.eval_data, ("prompt",))
        ]
    lookalikes = [row["prompt"] for row in read_rows("benign_lookalikes")]
    limit = args.limit
    judged = task[:limit], unsafe[:limit], lookalikes[:limit]
    return Data(user, poisoned(user, args), requests, *judged)


def load(args: argparse.Namespace, data: Data) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_aligned(dtype) if args.model is None else load_model(args.model, dtype)
    check_responses(tokenizer, data.user, "--user-data")
    for old in args.output_dir.glob("reference*.safetensors"):
        old.unlink()  # of a run with other rows, perhaps
    if torch.device(args.device).type == "cpu":
        # Plain matrix products train these short rows faster than the fused attention of a CPU.
        model.set_attn_implementation("eager")
    return model.to(args.device), tokenizer


def poisoned(user: list[Turn], args: argparse.Namespace) -> list[Turn]:
    """The training rows: those of the user and the given share of harmful ones, shuffled."""
    shuffle = random.Random(args.seed)
    count = args.steps * args.batch_size
    harmful = round(args.harmful_ratio * count)
    rows = drawn(user, count - harmful, shuffle) + drawn(harmful_turns("attack"), harmful, shuffle)
    shuffle.shuffle(rows)
    return rows


def batches(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], args: argparse.Namespace
) -> list[dict[str, torch.Tensor]]:
    """Batches of turns, in their order, on the device of the run."""
    size = args.batch_size
    found = [collate(tokenizer, turns[start : start + size]) for start in range(0, len(turns), size)]
    return [{name: value.to(args.device) for name, value in batch.items()} for batch in found]
