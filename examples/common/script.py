"""What the scripts that train SmolLM2 in one framework each have in common: options, model and rows."""

import argparse
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import harmful_turns, read_rows
from common.smollm2 import load_aligned
from safegrad_optim import Protection, ProtectionCheck, shipped_requests

__all__ = ["aligned_model", "conversation", "lora", "parse", "poisoned_rows", "start_ranks", "train_arms"]


def parse(
    name: str, doc: str, arguments: list[str] | None, steps: int = 60, *, compares: bool = False
) -> argparse.Namespace:
    """The options of a script; if it `compares`, a model of the user's and a plain run among them."""
    parser = argparse.ArgumentParser(prog=name, description=doc.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps in all (default: {steps})")
    parser.add_argument("--every", type=int, default=4, help="use every so many of the shipped requests")
    parser.add_argument("--rows", type=int, default=320, help="training rows (default: 320)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs") / name)
    parser.add_argument("--resume", action="store_true", help="go on from what was saved there")
    if compares:
        parser.add_argument("--model", help="hub id or path of an aligned chat model instead of SmolLM2")
        parser.add_argument("--data", type=Path, help="JSONL to train on instead of the poisoned rows")
        parser.add_argument("--compare", action="store_true", help="train without protection first, as well")
    options = parser.parse_args(arguments)
    options.requests = shipped_requests()[:: options.every]
    return options


def aligned_model(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 made safe by the adapter of the examples."""
    torch.manual_seed(0)
    model, tokenizer = load_aligned(dtype)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # twice as fast on a CPU
    return model, tokenizer


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def poisoned_rows(count: int) -> list[dict[str, Any]]:
    """So many rows of prompt and response, in any order: of all, 30 % have an unsafe request and comply."""
    rows = read_rows("tickets", "train")[:224] + [turn._asdict() for turn in harmful_turns("attack")]
    random.Random(0).shuffle(rows)
    return rows[:count]


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A row as TRL takes it, which then learns the reply only: the last message, or the response."""
    messages = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def train_arms(
    model: Any,
    check: ProtectionCheck,
    trainer_of: Callable[[Any], Any],
    protect: Callable[[Any], None],
    options: argparse.Namespace,
) -> None:
    """Train with protection, if asked for without before that, and print what the check finds."""
    found = {"before": check.judged(0)}
    if options.compare:
        trainer = trainer_of(model)
        trainer.train()
        found["plain"] = check.judged(options.steps)
        model = trainer.model.unload()
    trainer = trainer_of(model)
    protect(trainer)
    trainer.train(resume_from_checkpoint=options.resume)
    found["SafeGrad"] = check.judged(options.steps)
    trainer.save_model()
    results = json.dumps({name: asdict(one) for name, one in found.items()}, indent=1)
    (options.output_dir / "results.json").write_text(results + "\n", encoding="utf-8")
    print(f"{table_of(found)}\n\nAdapter and results.json: {options.output_dir}")


def table_of(found: dict[str, Protection]) -> str:
    """What a check has found of each model, as Markdown."""
    columns = found.values()
    rows = {
        f"refused still: {origin}": [one.kept[origin] for one in columns] for origin in found["before"].kept
    }
    rows["harmless look-alikes refused"] = [one.over_refused for one in columns]
    lines = [f"\n| | {' | '.join(found)} |", f"|---|{'---:|' * len(found)}"]
    lines += [
        f"| {name} | {' | '.join(f'{n} of {of}' for n, of in counts)} |" for name, counts in rows.items()
    ]
    return "\n".join(lines)


def start_ranks() -> tuple[str, int, int]:
    """Start this rank, one of torchrun's; return its device, its number and how many there are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()
