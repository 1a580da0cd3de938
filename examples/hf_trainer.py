"""SafeGrad in the Hugging Face Trainer: fine-tune SmolLM2 on poisoned data, and go on where it stopped.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --steps 120 --resume

The user task is to read order numbers as JSON; 30 % of the rows are unsafe requests with the opening
of a compliant reply. `safegrad/*` metrics are printed, and are in TensorBoard: see --output-dir.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from common.chat_data import harmful_turns, read_rows
from common.smollm2 import load_aligned
from safegrad_optim import ProtectionCheck, Reference, safety_rows, safety_sources, shipped_requests
from safegrad_optim.integrations.transformers import protect_trainer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps in all (default: 60)")
    parser.add_argument("--every", type=int, default=4, help="use every so many of the shipped requests")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/hf_trainer"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint there")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, tokenizer = load_aligned(torch.bfloat16)
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # twice as fast on a CPU
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    harmful = [turn._asdict() for turn in harmful_turns("attack")]
    turns = read_rows("tickets", "train")[:224] + harmful
    sources = safety_sources(model, tokenizer, turns, requests=shipped_requests()[:: options.every])
    print(sources)
    check = ProtectionCheck(model, tokenizer, sources)
    before = check.judged(0)

    args = TrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0,  # clips the user gradient alone; the optimizer below clips the final one
        logging_steps=5,
        save_steps=20,
        report_to=["tensorboard"],
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=Dataset.from_list(safety_rows(turns, tokenizer)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    # The reference is the model with its adapters off, so it is there at a resume as well.
    reference = Reference(resumed=options.resume)
    protect_trainer(trainer, sources, max_grad_norm=1.0, check=check, reference=reference)
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    print(f"Before: {before}\nAfter: {check.history[-1]}")
    print(f"Adapter, checkpoints and TensorBoard files: {options.output_dir}")


if __name__ == "__main__":
    main()
