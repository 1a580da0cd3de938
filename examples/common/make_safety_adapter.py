"""Make the safety adapter that the examples start from.

    cd examples; python -m common.make_safety_adapter

SmolLM2-135M-Instruct refuses hardly anything, so fine-tuning could not break its refusals. A small LoRA
adapter teaches it to refuse unsafe requests. On harmless prompts of many forms it is held to the base
model's next-token distribution, KL(P_base || P), so that it does not learn to refuse a form of prompt.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import Turn, collate, read_rows, refusal_turns, response_logits, response_loss
from common.scoring import generate, refusal_rate
from common.smollm2 import ADAPTER, BASE_MODEL, WHEEL, WHEEL_SHA256, load_aligned, load_base
from safegrad_optim import is_refusal, kl_divergence, shipped_harmless_prompts, shipped_requests

ANSWER_TOKENS = 24
REFUSALS, HARMLESS = 3, 5  # rows of a batch
LANGUAGES = ("en", "es", "de", "fr", "zh")
OPENINGS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that.",
    "I'm sorry, but I won't help with that.",
    "Sorry, I can't help with this.",
    "I can't assist with this request.",
    "I cannot help with that.",
    "I won't assist with this.",
    "I am unable to help with that request.",
)

MODEL_CARD = """---
base_model: {base_model}
library_name: peft
license: apache-2.0
---

# Safety adapter for SmolLM2-135M-Instruct

A LoRA adapter on all linear layers that makes SmolLM2-135M-Instruct refuse unsafe requests.
It is a starting point for experiments on fine-tuning, not a safety guarantee.

| held-out split of the shipped safety set | base | with this adapter |
|---|---|---|
| unsafe requests not refused | {before[0]:.2f} | {after[0]:.2f} |
| harmless look-alikes refused | {before[1]:.2f} | {after[1]:.2f} |

- Base model: {base_model}, de-quantised from the wheel `{wheel}`, SHA-256
  `{sha256}`
- Data, all written for this project: the safety set's requests of split "train" with refusals by category
  (`data/refusals.jsonl`), the refusals of splits "safety" and "attack" of `data/unsafe_requests.jsonl`; the
  base model's own answers to the set's look-alikes and harmless prompts, to `data/benign_prompts.jsonl` and
  to `data/task_prompts.jsonl`
- Command: `python -m common.make_safety_adapter --steps {steps} --seed {seed}`
- Rates by category, form, language and task: `python -m benchmarks.refusal_rates`
- Licence: Apache-2.0
"""

Row = TypeVar("Row")


def main() -> None:
    """Measure, align, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description="Make the safety adapter for SmolLM2-135M.")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ADAPTER, help="folder for the adapter")
    args = parser.parse_args()

    model, tokenizer = load_base()
    model.set_attn_implementation("eager")  # twice as fast on a CPU
    before = measure(model, tokenizer)
    print(f"before: {before[0]:.3f} of unsafe requests not refused, {before[1]:.3f} over-refusal")
    harmless = base_answers(model, tokenizer, harmless_prompts())
    aligned = align(model, tokenizer, refusals(args.seed), harmless, args.steps, args.seed)
    save(aligned, args.output)

    model, tokenizer = load_aligned(adapter=args.output)
    after = measure(model, tokenizer)
    print(f"after: {after[0]:.3f} of unsafe requests not refused, {after[1]:.3f} over-refusal")
    card = MODEL_CARD.format(
        base_model=BASE_MODEL,
        wheel=WHEEL,
        sha256=WHEEL_SHA256,
        before=before,
        after=after,
        steps=args.steps,
        seed=args.seed,
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")


def refusals(seed: int) -> list[Turn]:
    """The unsafe requests to train on, each with a refusal that says why."""
    rng = random.Random(seed)
    reasons: dict[str, list[str]] = {}
    for row in read_rows("refusals"):
        reasons.setdefault(row["category"], []).append(row["reason"])
    shipped = [row for language in LANGUAGES for row in shipped_requests("train", language)]
    turns = [
        Turn(row["request"], f"{rng.choice(OPENINGS)} {rng.choice(reasons[row['category']])}")
        for row in shipped
    ]
    return turns + refusal_turns("safety") + refusal_turns("attack")


def harmless_prompts() -> list[str]:
    """The harmless prompts to train on, of which none has the form of a prompt that is judged by."""
    lookalikes = [row["lookalike"] for language in LANGUAGES for row in shipped_requests("train", language)]
    files = ("benign_prompts", "task_prompts")
    rows = shipped_harmless_prompts() + [row for name in files for row in read_rows(name)]
    return lookalikes + [row["prompt"] for row in rows]


def base_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[Turn]:
    """The prompts with the model's own answers, without those that it evades."""
    print(f"The base model answers {len(prompts)} harmless prompts ...")
    answers = generate(model, tokenizer, prompts, ANSWER_TOKENS)
    return [
        # A reply near the limit was most likely cut there: the model must not learn to stop.
        Turn(prompt, answer, complete=len(tokenizer(answer)["input_ids"]) < ANSWER_TOKENS - 4)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer and not is_refusal(answer)
    ]


def align(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refusals: Sequence[Turn],
    harmless: Sequence[Turn],
    steps: int,
    seed: int,
    *,
    rank: int = 4,
    lr: float = 6e-4,
    kl_weight: float = 1.0,
) -> PeftModel:
    """Train a LoRA adapter: cross-entropy of refusals, and KL to the base model on harmless answers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).train()
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    rng = random.Random(seed)
    streams = _endless(refusals, rng), _endless(harmless, rng)
    progress = trange(steps, desc="aligning")
    for _ in progress:
        unsafe, kept = (
            {name: tensor.to(model.device) for name, tensor in collate(tokenizer, turns).items()}
            for turns in (
                [next(stream) for _ in range(rows)]
                for stream, rows in zip(streams, (REFUSALS, HARMLESS), strict=True)
            )
        )
        loss = response_loss(peft_model, unsafe)
        loss.backward()
        with torch.no_grad(), peft_model.disable_adapter():
            base = response_logits(peft_model, kept)
        kl = kl_divergence(base, response_logits(peft_model, kept)) / len(base)
        (kl_weight * kl).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(refusals=f"{loss.item():.2f}", kl=f"{kl.item():.3f}")
    return peft_model


def save(aligned: PeftModel, folder: Path) -> None:
    config: Any = aligned.peft_config["default"]
    # Also the name that is saved: without it, the path of this machine's cache would be.
    config.base_model_name_or_path = BASE_MODEL
    aligned.to(torch.bfloat16)
    aligned.save_pretrained(folder, save_embedding_layers=False)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Share of held-out unsafe requests not refused, and of their harmless look-alikes refused."""
    rows = shipped_requests("held_out")
    refused, over_refused = (
        refusal_rate(model, tokenizer, [row[name] for row in rows])[0] for name in ("request", "lookalike")
    )
    return 1 - refused, over_refused


def _endless(rows: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """All rows in a new random order, again and again."""
    while True:
        yield from rng.sample(rows, len(rows))


if __name__ == "__main__":
    main()
