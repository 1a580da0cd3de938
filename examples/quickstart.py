"""Fine-tune a safe model on poisoned data twice, plainly and with SafeGrad, and compare.

    python examples/quickstart.py

By default the model is SmolLM2-135M-Instruct made safe by `safety_adapter/`, the user task is to read
the order number in a support message as JSON, and 30 % of the training rows are unsafe requests with the
opening of a compliant reply. Prints one table, writes `results.json` and `curves.png` to --output-dir.
"""

import argparse
import sys
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import Turn, response_loss
from common.evaluation import evaluate, kl_to_reference, observation
from common.meter import Meter
from common.options import parse
from common.own_data import BadDataError, check_responses
from common.quickstart_data import Data, batches, load, poisoned, read_data
from common.report import Arm, show
from safegrad_optim import KLAlignment, ProtectionCheck, SafeGradOptimizer, SafetySources, safety_sources

# Every so many steps of the plain arm, cosine and KL are measured for the figure, outside its timing.
OBSERVE_EVERY = 20


def main(arguments: list[str] | None = None) -> int:
    args = parse(__doc__.splitlines()[0], arguments)
    # What transformers and peft will rename is for their callers to know, not for readers of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    try:
        data = read_data(args)
        model, tokenizer = load(args)
        check_responses(tokenizer, data.user, "--user-data")
        rows = poisoned(data, args)
        train_dataset = [row.prompt for row in rows]
        options = {"requests": data.requests, "prefix_weight": args.prefix_weight, "seed": args.seed}
        sources = safety_sources(model, tokenizer, train_dataset, **options)
    except (BadDataError, OSError, RuntimeError, ValueError) as error:
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(sources)
    before = Arm("before", evaluate(model, tokenizer, data, "before"))
    arms = [before]
    for name in ("plain", "SafeGrad"):
        arm, model = fine_tune(name, model, tokenizer, data, rows, sources, args)
        arms.append(arm)
    show(arms, [turn.prompt for turn in data.unsafe], args.output_dir, vars(args))
    print(f"\n{time.perf_counter() - started:.0f} s. Figure and numbers: {args.output_dir}")
    return 0


def fine_tune(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    rows: list[Turn],
    sources: SafetySources,
    args: argparse.Namespace,
) -> tuple[Arm, PreTrainedModel]:
    """Train fresh adapters on the poisoned rows, judge them, and return the model without them."""
    torch.manual_seed(args.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, lora)
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    alignment = KLAlignment(tuned, sources, seed=args.seed)
    check = ProtectionCheck(tuned, tokenizer, sources, requests=[turn.prompt for turn in data.unsafe])

    optimizer: Any = torch.optim.AdamW(parameters, lr=args.lr)
    if name == "SafeGrad":
        optimizer = SafeGradOptimizer(optimizer, alignment, rho=args.rho, refresh_every=args.refresh_every)

    arm, meter = Arm(name), Meter(args.device)
    tuned.train()
    for step, batch in enumerate(tqdm(batches(tokenizer, rows, args), desc=f"{name}: training")):
        with meter:
            response_loss(tuned, batch).backward()
        if name == "plain" and step % OBSERVE_EVERY == 0:
            arm.observe(step, *observation(parameters, alignment))
        with meter:
            optimizer.step()
            optimizer.zero_grad()
        meter.lap()
        check(step + 1)
        if name == "SafeGrad" and optimizer.stats is not None:
            arm.observe(step, float(optimizer.stats.cosine), float(alignment.last_loss))
    arm.seconds_per_step, arm.peak_memory_gb = meter.median_seconds, meter.peak_gb
    if name == "SafeGrad":
        arm.conflict_rate = optimizer.counts.conflicts / optimizer.counts.steps
    print(f"{name}: {check.judged(args.steps)}")
    arm.evaluation = evaluate(tuned, tokenizer, data, name)
    arm.kl_to_reference = kl_to_reference(tuned, tokenizer, data, args)
    return arm, tuned.unload()


if __name__ == "__main__":
    sys.exit(main())
