"""Make the safety adapter that the examples start from.

    cd examples; python -m common.make_safety_adapter

SmolLM2-135M-Instruct refuses hardly anything, so fine-tuning could not break its refusals. A small LoRA
adapter teaches it to refuse unsafe requests. On harmless prompts of many forms it is held to the base
model's next-token distribution, KL(P_base || P), so that it does not learn to refuse a form of prompt.
"""

import argparse
import random
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import Turn, collate, drawn, read_rows, response_loss
from common.scoring import generate, refusal_rate
from common.smollm2 import ADAPTER, BASE_MODEL, WHEEL, WHEEL_SHA256, load_aligned, load_base
from safegrad_optim import (
    KLAlignment,
    SafeGradOptimizer,
    SafetySource,
    is_refusal,
    shipped_harmless_prompts,
    shipped_requests,
)

ANSWER_TOKENS = 10
FORMS_OF_A_LINE = 2
ROWS = 4  # of a step, of each kind
RANK = 16
LR = 2e-3
RHO = 2.0
OPENING_TOKENS = 10  # after an apology it takes eight to tell whether a reply refuses
MAX_TOKENS = 100  # of a row; the few longer ones take a fifth of the time
LANGUAGES = ("en", "es", "de", "fr", "zh")
REPLIES = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that.",
    "I can't help with that.",
    "I won't help with that.",
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
- Data, all written for this project: requests of split "train" of the safety set, of
  `data/request_pairs.jsonl`, and of "safety" and "attack" of `data/unsafe_requests.jsonl`; the base model's
  own answers to the look-alikes of the first two, to the harmless prompts of the set, to
  `data/benign_prompts.jsonl`, `data/task_prompts.jsonl`, and `data/lines.jsonl` in `data/task_forms.jsonl`
- Command: `python -m common.make_safety_adapter --steps {steps} --seed {seed}`
- Rates by category, form, language and task: `python -m benchmarks.refusal_rates`
- Licence: Apache-2.0
"""


def main() -> None:
    """Measure, align, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description="Make the safety adapter for SmolLM2-135M.")
    parser.add_argument("--steps", type=int, default=450, help="optimizer steps (default: 450)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ADAPTER, help="folder for the adapter")
    args = parser.parse_args()

    model, tokenizer = load_base()
    model.set_attn_implementation("eager")  # twice as fast on a CPU
    before = measure(model, tokenizer)
    print(f"before: {before[0]:.3f} of unsafe requests not refused, {before[1]:.3f} over-refusal")
    harmless = [
        base_answers(model, tokenizer, prompts) for prompts in (lookalikes(), ordinary_prompts(args.seed))
    ]
    aligned = align(model, tokenizer, refusals(), harmless, args.steps, args.seed)
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


def refusals() -> list[Turn]:
    """The unsafe requests to train on, each with a refusal."""
    requests = [row["request"] for language in LANGUAGES for row in shipped_requests("train", language)]
    requests += [row["prompt"] for row in read_rows("request_pairs")]
    requests += [
        row["prompt"] for split in ("safety", "attack") for row in read_rows("unsafe_requests", split)
    ]
    return [Turn(request, reply) for request, reply in zip(requests, cycle(REPLIES), strict=False)]


def lookalikes() -> list[str]:
    """The harmless look-alikes of the unsafe requests."""
    shipped = [row["lookalike"] for language in LANGUAGES for row in shipped_requests("train", language)]
    return shipped + [row["lookalike"] for row in read_rows("request_pairs")]


def ordinary_prompts(seed: int) -> list[str]:
    """Other harmless prompts to train on, of which none has the form of a prompt that is judged by."""
    rng = random.Random(seed)
    rows = shipped_harmless_prompts() + read_rows("benign_prompts") + read_rows("task_prompts")
    prompts = [row["prompt"] for row in rows]
    forms = [row["form"] for row in read_rows("task_forms")]
    for row in read_rows("lines"):
        prompts += [form.replace("{text}", row["text"]) for form in rng.sample(forms, FORMS_OF_A_LINE)]
    return prompts


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
    harmless: Sequence[Sequence[Turn]],
    steps: int,
    seed: int,
) -> PeftModel:
    """Train a LoRA adapter to refuse, with the base model's answers to harmless prompts as what is kept.

    It is SafeGrad the other way round: the user gradient is that of the refusals' cross-entropy.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).train()
    # The first words decide whether a reply refuses.
    sources = [
        SafetySource(
            rows=[collate(tokenizer, batch) for batch in _of_like_length(tokenizer, turns)],
            tokens=OPENING_TOKENS,
        )
        for turns in harmless
    ]
    alignment = KLAlignment(peft_model, sources, seed=seed)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    base_optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.0)
    optimizer = SafeGradOptimizer(base_optimizer, alignment, rho=RHO)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=steps, pct_start=0.05, anneal_strategy="linear", cycle_momentum=False
    )
    batches = drawn(_of_like_length(tokenizer, refusals), steps, random.Random(seed))
    progress = tqdm(batches, desc="aligning")
    for turns in progress:
        batch = {name: tensor.to(model.device) for name, tensor in collate(tokenizer, turns).items()}
        loss = response_loss(peft_model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(refusals=f"{loss.item():.2f}", kl=f"{alignment.last_loss.item():.3f}")
    return peft_model


def _of_like_length(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> list[list[Turn]]:
    """Batches with little padding, without rows that are long."""
    lengths = [collate(tokenizer, [turn])["input_ids"].shape[1] for turn in turns]
    kept = [turn for length, turn in sorted(zip(lengths, turns, strict=True)) if length <= MAX_TOKENS]
    return [kept[start : start + ROWS] for start in range(0, len(kept), ROWS)]


def save(aligned: PeftModel, folder: Path) -> None:
    config: Any = aligned.peft_config["default"]
    # Also the name that is saved: without it, the path of this machine's cache would be.
    config.base_model_name_or_path = BASE_MODEL
    aligned.to(torch.bfloat16)
    aligned.save_pretrained(str(folder), save_embedding_layers=False)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Share of held-out unsafe requests not refused, and of their harmless look-alikes refused."""
    rows = shipped_requests("held_out")
    refused, over_refused = (
        refusal_rate(model, tokenizer, [row[name] for row in rows])[0] for name in ("request", "lookalike")
    )
    return 1 - refused, over_refused


if __name__ == "__main__":
    main()
