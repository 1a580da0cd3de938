"""SafeGrad in a raw accelerate loop: fine-tune SmolLM2 on poisoned data, and go on where it stopped.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --steps 80 --resume

The user task is to read order numbers as JSON; 30 % of the rows are unsafe requests with the opening
of a compliant reply.
"""

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_constant_schedule_with_warmup

from common.script import aligned_model, lora, parse, poisoned_rows
from safegrad_optim import KLAlignment, ProtectionCheck, SafeGradOptimizer, safety_rows, safety_sources


def main(arguments: list[str] | None = None) -> None:
    options = parse("accelerate_loop", __doc__, arguments)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, tokenizer = aligned_model(torch.bfloat16)
    model = get_peft_model(model, lora())
    rows = safety_rows(poisoned_rows(options.rows), tokenizer)

    model = accelerator.prepare(model)  # first, so that the alignment is of the model in its place
    sources = safety_sources(model, tokenizer, rows, requests=options.requests)
    accelerator.print(sources)
    check = ProtectionCheck(model, tokenizer, sources)
    before = check.judged(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    safegrad = SafeGradOptimizer(
        torch.optim.AdamW(parameters, lr=3e-4),
        KLAlignment(model, sources),
        max_grad_norm=1.0,
        refresh_every=4,
    )
    optimizer, loader, scheduler = accelerator.prepare(
        safegrad,
        DataLoader(rows, batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer), drop_last=True),
        get_constant_schedule_with_warmup(safegrad, 5),
    )
    if options.resume:
        accelerator.load_state(options.output_dir)

    model.train()
    while safegrad.counts.steps < options.steps:
        done = safegrad.counts.steps * accelerator.gradient_accumulation_steps % len(loader)
        for batch in accelerator.skip_first_batches(loader, done):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                steps, cosine = safegrad.counts.steps, safegrad.stats.cosine.item()
                check(steps)
                accelerator.print(f"step {steps}: loss {loss:.3f}, cosine {cosine:+.3f}")
                if steps == options.steps:
                    break
    accelerator.save_state(options.output_dir)
    accelerator.print(f"Before: {before}\nAfter: {check.judged(options.steps)}")
    accelerator.print(f"{safegrad.counts}. State: {options.output_dir}")


if __name__ == "__main__":
    main()
