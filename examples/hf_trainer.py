"""SafeGrad in the Hugging Face Trainer: fine-tune SmolLM2 on poisoned data, and go on where it stopped.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --steps 120 --resume

The user task is to read order numbers as JSON; 30 % of the rows are unsafe requests with the opening
of a compliant reply. `safegrad/*` metrics are printed, and are in TensorBoard: see --output-dir.
"""

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from common.script import aligned_model, lora, parse, poisoned_rows
from safegrad_optim import ProtectionCheck, Reference, safety_rows, safety_sources
from safegrad_optim.integrations.transformers import protect_trainer


def main(arguments: list[str] | None = None) -> None:
    options = parse("hf_trainer", __doc__, arguments)

    model, tokenizer = aligned_model(torch.bfloat16)
    model = get_peft_model(model, lora())
    rows = poisoned_rows(options.rows)
    sources = safety_sources(model, tokenizer, rows, requests=options.requests)
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
        train_dataset=Dataset.from_list(safety_rows(rows, tokenizer)),
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
