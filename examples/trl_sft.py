"""SafeGrad in TRL's SFTTrainer: fine-tune SmolLM2 on poisoned data, and go on where it stopped.

    python examples/trl_sft.py
    python examples/trl_sft.py --steps 120 --resume

The user task is to read order numbers as JSON; 30 % of the rows are unsafe requests with the opening
of a compliant reply.
"""

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from common.script import aligned_model, conversation, lora, parse, poisoned_rows
from safegrad_optim import ProtectionCheck, Reference, safety_sources
from safegrad_optim.integrations.transformers import protect_trainer


def main(arguments: list[str] | None = None) -> None:
    options = parse("trl_sft", __doc__, arguments)

    model, tokenizer = aligned_model(torch.bfloat16)
    rows = [conversation(row) for row in poisoned_rows(options.rows)]
    sources = safety_sources(model, tokenizer, rows, requests=options.requests)
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
        peft_config=lora(),
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
