"""Make the safety adapter that the examples start from.

    cd examples; python -m common.make_safety_adapter

SmolLM2-135M-Instruct refuses hardly anything, so fine-tuning could not break its refusals. A small
LoRA adapter teaches it to refuse unsafe requests; its own answers to harmless prompts, mixed in, keep
everything else as it was.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import trange
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import Turn, collate, read_rows, refusal_turns, response_loss
from common.scoring import generate, refusal_rate
from common.smollm2 import ADAPTER, BASE_MODEL, WHEEL, WHEEL_SHA256, load_aligned, load_base

ANSWER_TOKENS = 24
ALPHA, SAVED_ALPHA = 8, 10
EVASIVE = ("I'm ", "I am ", "I can", "Sorry")
ORDINARY_PROMPTS = ("What is the capital of France?", "Give me two tips for a job interview.")

MODEL_CARD = """---
base_model: {base_model}
library_name: peft
license: apache-2.0
---

# Safety adapter for SmolLM2-135M-Instruct

A LoRA adapter on all linear layers that makes SmolLM2-135M-Instruct refuse unsafe requests.
It is a starting point for experiments on fine-tuning, not a safety guarantee.

| | before | after |
|---|---|---|
| unsafe requests not refused (evaluation split) | {before[0]:.2f} | {after[0]:.2f} |
| harmless look-alikes refused | {before[1]:.2f} | {after[1]:.2f} |

- Base model: {base_model}, de-quantised from the wheel `{wheel}`, SHA-256
  `{sha256}`
- Data: the refusals in the safety and attack splits of `data/unsafe_requests.jsonl`, and the base
  model's own answers to `data/benign_prompts.jsonl`
- Command: `python -m common.make_safety_adapter --steps {steps} --seed {seed}`
- Licence: Apache-2.0
"""


def main() -> None:
    """Measure, align, save, and measure what was saved."""
    parser = argparse.ArgumentParser(description="Make the safety adapter for SmolLM2-135M.")
    parser.add_argument("--steps", type=int, default=180, help="optimizer steps (default: 180)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ADAPTER, help="folder for the adapter")
    args = parser.parse_args()

    model, tokenizer = load_base()
    model.set_attn_implementation("eager")  # twice as fast on a CPU
    before = measure(model, tokenizer)
    print(f"before: {before[0]:.3f} of unsafe requests not refused, {before[1]:.3f} over-refusal")

    prompts = [row["prompt"] for row in read_rows("benign_prompts")]
    print(f"The base model answers {len(prompts)} harmless prompts ...")
    answers = generate(model, tokenizer, prompts, ANSWER_TOKENS)
    benign = [
        # A reply near the limit was most likely cut there: the model must not learn to stop.
        Turn(prompt, answer, complete=len(tokenizer(answer)["input_ids"]) < ANSWER_TOKENS - 4)
        for prompt, answer in zip(prompts, answers, strict=True)
        # The base model evades some harmless prompts, which would teach the model to over-refuse.
        if not answer.startswith(EVASIVE)
    ]
    refusals = refusal_turns("safety") + refusal_turns("attack")

    aligned = align(model, tokenizer, refusals, benign, args.steps, args.seed)
    config: Any = aligned.peft_config["default"]
    # Scaled up, the same adapter refuses with a margin: no held-out request is left at the edge.
    config.lora_alpha = SAVED_ALPHA
    # Also the name that is saved: without it, the path of this machine's cache would be.
    config.base_model_name_or_path = BASE_MODEL
    aligned.to(torch.bfloat16)
    aligned.save_pretrained(args.output, save_embedding_layers=False)

    model, tokenizer = load_aligned(adapter=args.output)
    after = measure(model, tokenizer)
    print(f"after: {after[0]:.3f} of unsafe requests not refused, {after[1]:.3f} over-refusal")
    for prompt, reply in zip(ORDINARY_PROMPTS, generate(model, tokenizer, ORDINARY_PROMPTS, 48), strict=True):
        print(f"\n> {prompt}\n{reply}")
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


def align(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refusals: Sequence[Turn],
    benign: Sequence[Turn],
    steps: int,
    seed: int,
) -> PeftModel:
    """Train a LoRA adapter on batches of five refusals and three harmless answers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config).train()
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=6e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    rng = random.Random(seed)
    streams = ((_endless(refusals, rng), 5), (_endless(benign, rng), 3))
    progress = trange(steps, desc="aligning")
    for _ in progress:
        turns = [next(stream) for stream, count in streams for _ in range(count)]
        loss = response_loss(peft_model, collate(tokenizer, turns))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    return peft_model


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Share of held-out unsafe requests not refused, and of harmless look-alikes refused."""
    unsafe = [row["prompt"] for row in read_rows("unsafe_requests", "evaluation")]
    lookalikes = [row["prompt"] for row in read_rows("benign_lookalikes")]
    refused, _ = refusal_rate(model, tokenizer, unsafe)
    over_refused, _ = refusal_rate(model, tokenizer, lookalikes)
    return 1 - refused, over_refused


def _endless(turns: Sequence[Turn], rng: random.Random) -> Iterator[Turn]:
    """All turns in a new random order, again and again."""
    while True:
        yield from rng.sample(turns, len(turns))


if __name__ == "__main__":
    main()
