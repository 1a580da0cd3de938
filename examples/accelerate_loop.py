"""SafeGrad in a raw accelerate loop: fine-tune SmolLM2 on poisoned data, and go on where it stopped.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --steps 80 --resume

The user task is to read order numbers as JSON; 30 % of the rows are unsafe requests with the opening
of a compliant reply.
"""

import argparse
import random
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_constant_schedule_with_warmup

from common.chat_data import harmful_turns, read_rows
from common.smollm2 import load_aligned
from safegrad_optim import (
    KLAlignment,
    ProtectionCheck,
    SafeGradOptimizer,
    safety_rows,
    safety_sources,
    shipped_requests,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=4, help="use every so many of the shipped requests")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/accelerate_loop"))
    parser.add_argument("--resume", action="store_true", help="go on from the state saved there")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, tokenizer = load_aligned(torch.bfloat16)
    if accelerator.device.type == "cpu":
        model.set_attn_implementation("eager")  # twice as fast on a CPU
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, lora)

    harmful = [turn._asdict() for turn in harmful_turns("attack")]
    rows = safety_rows(read_rows("tickets", "train")[:224] + harmful, tokenizer)
    random.Random(0).shuffle(rows)

    model = accelerator.prepare(model)  # first, so that the alignment is of the model in its place
    sources = safety_sources(model, tokenizer, rows, requests=shipped_requests()[:: options.every])
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
