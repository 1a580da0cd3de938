"""SafeGrad in TRL's SFTTrainer: fine-tune SmolLM2 on poisoned data, and go on where it stopped.

    python examples/trl_sft.py
    python examples/trl_sft.py --steps 120 --resume

The user task is to read order numbers as JSON; 30 % of the rows are unsafe requests with the opening
of a compliant reply.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from common.chat_data import harmful_turns, read_rows
from common.smollm2 import load_aligned
from safegrad_optim import ProtectionCheck, Reference, safety_sources, shipped_requests
from safegrad_optim.integrations.transformers import protect_trainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps in all (default: 60)")
    parser.add_argument("--every", type=int, default=4, help="use every so many of the shipped requests")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/trl_sft"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint there")
    options = parser.parse_args(arguments)

    model, tokenizer = load_aligned(torch.bfloat16)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # twice as fast on a CPU

    harmful = [turn._asdict() for turn in harmful_turns("attack")]
    rows = [conversation(row) for row in read_rows("tickets", "train")[:224] + harmful]
    sources = safety_sources(model, tokenizer, rows, requests=shipped_requests()[:: options.every])
    print(sources)
    check = ProtectionCheck(model, tokenizer, sources)
    before = check.judged(0)

    args = SFTConfig(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        bf16=False,  # the model is in bf16 as a whole, its adapters in fp32
        max_grad_norm=0,  # clips the user gradient alone; the optimizer below clips the final one
        logging_steps=5,
        save_steps=20,
        report_to=["tensorboard"],
    )
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # The reference is the model with its adapters off, so it is there at a resume as well.
    reference = Reference(resumed=options.resume)
    protect_trainer(trainer, sources, max_grad_norm=1.0, check=check, reference=reference)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    print(f"Before: {before}\nAfter: {check.history[-1]}")
    print(f"Adapter, checkpoints and TensorBoard files: {options.output_dir}")


def conversation(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row as TRL takes it, which then learns the reply only."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["response"]}],
    }


if __name__ == "__main__":
    main()
