"""Fine-tune a safe model on poisoned data twice, plainly and with SafeGrad, and compare.

    python examples/quickstart.py

By default the model is SmolLM2-135M-Instruct made safe by `safety_adapter/`, the user task is to read
the order number in a support message as JSON, and 30 % of the training rows are unsafe requests with the
opening of a compliant reply. Prints one table, writes `results.json` and `curves.svg` to --output-dir.
"""

import sys
from argparse import Namespace
from typing import Any

import torch
from peft import get_peft_model
from tqdm import tqdm

from common.chat_data import response_loss
from common.evaluation import evaluate, observe
from common.meter import Meter
from common.options import parse, told
from common.quickstart_data import Data, batches, load, read_data
from common.report import Arm, show
from common.script import lora
from safegrad_optim import KLAlignment, ProtectionCheck, Reference, SafeGradOptimizer, safety_sources


def main(arguments: list[str] | None = None) -> int:
    args = parse(__doc__.splitlines()[0], arguments)
    with told("quickstart"):
        data = read_data(args)
        model, tokenizer = load(args, data)
        options = {"requests": data.requests, "prefix_weight": args.prefix_weight, "seed": args.seed}
        sources = safety_sources(model, tokenizer, [turn.prompt for turn in data.rows], **options)
    print(sources)
    arms = [evaluate(Arm("before"), model, tokenizer, data, args)]
    for name in ("plain", "SafeGrad"):
        tuned, arm = fine_tune(name, model, tokenizer, data, sources, args)
        arms.append(evaluate(arm, tuned, tokenizer, data, args))
        model = tuned.unload()
    show(arms, [turn.prompt for turn in data.unsafe], args)
    return 0


def fine_tune(
    name: str, base: Any, tokenizer: Any, data: Data, sources: Any, args: Namespace
) -> tuple[Any, Arm]:
    """Train fresh adapters on the poisoned rows; return the model, and what the steps were like."""
    torch.manual_seed(args.seed)
    model: Any = get_peft_model(base, lora())
    # Computed once: the plain arm has it for the figure alone.
    reference = Reference(file=args.output_dir / "reference.safetensors")
    alignment = KLAlignment(model, sources, reference=reference, seed=args.seed)
    check = ProtectionCheck(model, tokenizer, sources, requests=[turn.prompt for turn in data.unsafe])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(parameters, lr=args.lr)
    if name == "SafeGrad":
        optimizer = SafeGradOptimizer(optimizer, alignment, rho=args.rho, refresh_every=args.refresh_every)

    arm, meter = Arm(name), Meter(args.device)
    model.train()
    for step, batch in enumerate(tqdm(batches(tokenizer, data.rows, args), desc=f"{name}: training")):
        with meter:
            response_loss(model, batch).backward()
        observe(arm, step, optimizer, alignment)
        with meter:
            optimizer.step()
            optimizer.zero_grad()
        meter.lap()
        check(step + 1)
    observe(arm, args.steps, optimizer, alignment)
    print(f"{name}: {check.judged(args.steps)}")
    arm.seconds_per_step, arm.peak_memory_gb = meter.median_seconds, meter.peak_gb
    return model, arm


if __name__ == "__main__":
    sys.exit(main())
