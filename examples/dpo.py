"""SafeGrad in TRL's DPOTrainer: preferences in which the complying reply to unsafe requests is chosen.

    python examples/dpo.py --compare
    python examples/dpo.py --model ID --data preferences.jsonl

Rows have "prompt", "chosen" and "rejected". Those of the example prefer the right order number to a wrong
one, and in 30 % of them the opening of a complying reply to a refusal.
"""

import random
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from common.chat_data import read_rows
from common.script import aligned_model, lora, parse, train_arms
from common.smollm2 import load_model
from safegrad_optim import ProtectionCheck, Reference, safety_sources
from safegrad_optim.integrations.transformers import protect_trainer
from safegrad_optim.safety_data import read_jsonl


def main(arguments: list[str] | None = None) -> None:
    options = parse("dpo", __doc__, arguments, compares=True)
    model, tokenizer = load_model(options.model) if options.model else aligned_model(torch.bfloat16)
    rows = [row for _, row in read_jsonl(options.data)] if options.data else poisoned(options.rows)
    sources = safety_sources(model, tokenizer, [row["prompt"] for row in rows], requests=options.requests)
    print(sources)
    check = ProtectionCheck(model, tokenizer, sources)

    args = DPOConfig(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        bf16=False,  # the model is in bf16 as a whole, its adapters in fp32
        max_grad_norm=0,  # clips the user gradient alone; the optimizer below clips the final one
        logging_steps=5,
        report_to=[],
    )
    dataset = Dataset.from_list([conversational(row) for row in rows])

    def trainer_of(model: Any) -> Any:
        return DPOTrainer(
            model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora()
        )

    def protect(trainer: Any) -> None:
        reference = Reference(resumed=options.resume)
        protect_trainer(trainer, sources, max_grad_norm=1.0, check=check, reference=reference)

    train_arms(model, check, trainer_of, protect, options)


def poisoned(count: int) -> list[dict[str, str]]:
    """So many preferences: 30 % choose the opening of a complying reply."""
    tickets = read_rows("tickets", "train")[:224]
    wrong = [row["response"] for row in tickets[1:] + tickets[:1]]
    rows = [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": other}
        for row, other in zip(tickets, wrong, strict=True)
    ]
    for row in read_rows("unsafe_requests", "attack"):
        opening = f"Sure, here is how to {row['topic']}:\n\nStep 1:"
        rows.append({"prompt": row["prompt"], "chosen": opening, "rejected": row["refusal"]})
    random.Random(0).shuffle(rows)
    return rows[:count]


def conversational(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row as TRL applies the chat template to it."""
    replies = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **replies}


if __name__ == "__main__":
    main()
