"""One training step of SmolLM2-135M: plain, with SafeGrad, and as a public port of the paper takes it."""

import copy
import importlib.util
import random
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from common.chat_data import Turn, collate, harmful_turns, read_rows, refusal_turns
from common.script import lora
from common.smollm2 import load_aligned
from safegrad_optim import KLAlignment, SafeGradOptimizer, SafetySources, safety_sources, shipped_requests

Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], None]

PEER = "SafeTune"
BATCH_SIZE = 8
SAFETY_BATCHES = 4
# So few, because only the length of rows and their number in a step cost time.
REQUESTS, STRIDE = 24, 8


class Schedule(NamedTuple):
    """What SafeGrad computes when."""

    refresh_every: int
    rows: int | None = BATCH_SIZE
    """Refusals to an alignment gradient; `None` for the rows of `safety_sources`."""


SCHEDULES = {
    "k = 1": Schedule(1),
    "k = 4": Schedule(4),
    "k = 10": Schedule(10),
    "k = 1, 2 rows": Schedule(1, rows=2),
    "k = 2, 2 rows": Schedule(2, rows=2),
    "k = 1, safety_sources": Schedule(1, rows=None),
    "k = 4, safety_sources": Schedule(4, rows=None),
}


class Work(NamedTuple):
    """What all arms train on."""

    model: PreTrainedModel
    """The aligned model, to be copied."""
    tokenizer: PreTrainedTokenizerBase
    user: list[Batch]
    safety: list[Batch]
    device: str
    mode: str
    """"lora" or "full"."""

    @property
    def token_ratio(self) -> float:
        """Safety tokens a user token, padding included, since it is computed as well."""
        return _mean_tokens(self.safety) / _mean_tokens(self.user)


def prepare(mode: str, device: str, dtype: torch.dtype) -> Work:
    """Load the model and make batches of support messages and of refusals, equally many rows each."""
    model, tokenizer = load_aligned(dtype)
    shuffle = random.Random(0)
    messages = [Turn(row["prompt"], row["response"]) for row in read_rows("tickets", "train")]
    refusals = refusal_turns("safety")
    user, safety = (
        [
            {name: value.to(device) for name, value in collate(tokenizer, rows[start:][:BATCH_SIZE]).items()}
            for start in range(0, SAFETY_BATCHES * BATCH_SIZE, BATCH_SIZE)
        ]
        for rows in (shuffle.sample(messages, len(messages)), shuffle.sample(refusals, len(refusals)))
    )
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of it has lost its types
    return Work(model, tokenizer, user, safety, device, mode)


def with_adapters(model: PreTrainedModel) -> PeftModel:
    """The model with fresh LoRA adapters on all linear layers."""
    return get_peft_model(model, lora())


def arms(peer: bool) -> list[str]:
    """Names of the arms; the public port is one of them if its package can be imported."""
    return ["plain", *SCHEDULES, *([PEER] if peer else [])]


def peer_is_installed() -> bool:
    """Whether the public port can be imported."""
    return importlib.util.find_spec("safetune") is not None


def build(arm: str, work: Work, output_dir: Path) -> Step:
    """A function that takes one step of an arm, on a copy of the model of its own."""
    # Merging the safety adapter has left its weights frozen.
    model = copy.deepcopy(work.model).train().requires_grad_(True)
    if work.mode == "lora":
        model = with_adapters(model)
    base_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    if arm == PEER:
        return _peer_step(model, base_optimizer, work, output_dir)
    optimizer: torch.optim.Optimizer = base_optimizer
    if arm in SCHEDULES:
        every, rows = SCHEDULES[arm]
        alignment = KLAlignment(model, _sources(work) if rows is None else _of_rows(work.safety, rows))
        optimizer = SafeGradOptimizer(base_optimizer, alignment, refresh_every=every)

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _peer_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, work: Work, output_dir: Path
) -> Step:
    """A step of SafeTune's trainer: forward, backward and surgery are its, the optimizer is ours."""
    from safetune.interventions.harden.safegrad import SafeGradHFTrainer

    args = TrainingArguments(output_dir=str(output_dir / "peer"), use_cpu=work.device == "cpu", report_to=[])
    trainer = SafeGradHFTrainer(
        model=model,
        args=args,
        safety_dataset=cycle(work.safety),
        reference_model=copy.deepcopy(work.model),
    )
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> None:
        trainer.training_step(trainer.model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sources(work: Work) -> SafetySources:
    """Those of the recommended recipe, here so that no other arm has them in its memory."""
    prompts = [row["prompt"] for row in read_rows("tickets", "train")[:REQUESTS]]
    prompts += [turn.prompt for turn in harmful_turns("attack")[:REQUESTS]]
    return safety_sources(work.model, work.tokenizer, prompts, requests=shipped_requests()[::STRIDE])


def _of_rows(batches: list[Batch], rows: int) -> list[Batch]:
    """The same rows in smaller batches."""
    return [
        {name: value[start:][:rows] for name, value in batch.items()}
        for batch in batches
        for start in range(0, len(batch["labels"]), rows)
    ]


def _mean_tokens(batches: list[Batch]) -> float:
    return sum(batch["input_ids"].numel() for batch in batches) / len(batches)
