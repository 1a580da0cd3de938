"""Fine-tune a safe model on poisoned data twice, plainly and with SafeGrad, and compare.

    python examples/quickstart.py

By default the model is SmolLM2-135M-Instruct made safe by `safety_adapter/`, the user task is to read
the order number in a support message as JSON, and 30 % of the training rows are unsafe requests with the
opening of a compliant reply. Prints one table, writes `results.json` and `curves.png` to --output-dir.
"""

import argparse
import math
import random
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat_data import Turn, collate, drawn, harmful_turns, read_rows, refusal_turns, response_loss
from common.meter import Meter
from common.own_data import BadDataError, check_responses, read_texts, split_off
from common.report import Arm, Evaluation, print_replies, print_table, save_curves, save_results
from common.scoring import refusal_rate, task_accuracy
from common.smollm2 import load_aligned, load_model
from safegrad_optim import (
    KLAlignment,
    SafeGradOptimizer,
    SafetySources,
    inner_products,
    kl_divergence,
    safety_sources,
    shipped_requests,
)

Batch = dict[str, torch.Tensor]

# Every so many steps of the plain arm, cosine and KL are measured for the figure, outside its timing.
OBSERVE_EVERY = 20


class Data(NamedTuple):
    """Everything the run reads: rows to train on, rows to stay safe by, rows to judge by."""

    user: list[Turn]
    attack: list[Turn]
    requests: list[dict[str, str]]
    task: list[Turn]
    unsafe: list[Turn]
    lookalikes: list[str]


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # What transformers and peft will rename is for their callers to know, not for readers of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    try:
        data = read_data(args)
        model, tokenizer = load(args)
        check_responses(tokenizer, data.user, "--user-data")
        rows = poisoned(data, args)
        sources = safety_sources(
            model, tokenizer, [row.prompt for row in rows], requests=data.requests, seed=args.seed
        )
    except (BadDataError, OSError, RuntimeError, ValueError) as error:
        print(f"quickstart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(sources)
    before = Arm("before", evaluate(model, tokenizer, data, "before"))
    arms = [before]
    for name in ("plain", "SafeGrad"):
        arm, model = fine_tune(name, model, tokenizer, data, rows, sources, args)
        arms.append(arm)
    print_replies(arms, [turn.prompt for turn in data.unsafe])
    print_table(arms)
    save_curves(arms[1:], args.output_dir / "curves.png")
    save_results(arms, vars(args), args.output_dir / "results.json")
    print(f"\n{time.perf_counter() - started:.0f} s. Figure and numbers: {args.output_dir}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="hub id or path of an aligned chat model instead of SmolLM2")
    parser.add_argument("--user-data", type=Path, help="JSONL with prompt, response: the user task")
    parser.add_argument("--safety-data", type=Path, help="JSONL with request, lookalike: refusals to keep")
    parser.add_argument("--eval-data", type=Path, help="JSONL with prompt: held-out unsafe requests")
    parser.add_argument("--harmful-ratio", type=share, default=0.3, help="share of harmful rows")
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--lr", type=not_negative, default=3e-4)
    parser.add_argument("--rho", type=not_negative, default=1.0, help="weight of the alignment gradient")
    parser.add_argument("--refresh-every", type=positive, default=1, help="steps per alignment gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--limit", type=positive, help="rows to judge by, of each kind")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
        raise argparse.ArgumentTypeError(f"{text} is not a device here: {error}") from None
    return text


def share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def read_data(args: argparse.Namespace) -> Data:
    if args.user_data is None:
        user = [Turn(row["prompt"], row["response"]) for row in read_rows("tickets", "train")]
        task = [Turn(row["prompt"], row["response"]) for row in read_rows("tickets", "evaluation")]
    else:
        rows = read_texts(args.user_data, ("prompt", "response"))
        user, task = split_off([Turn(row["prompt"], row["response"]) for row in rows], args.user_data)
    if args.safety_data is None:
        # Every fourth, for these are the minutes on a CPU before training starts.
        requests = shipped_requests()[::4]
    else:
        requests = read_texts(args.safety_data, ("request", "lookalike"))
    unsafe = refusal_turns("evaluation")
    if args.eval_data is not None:
        # Only their prompts are judged; KL to the reference is taken on a generic refusal.
        unsafe = [
            Turn(row["prompt"], "I'm sorry, but I can't help with that.")
            for row in read_texts(args.eval_data, ("prompt",))
        ]
    lookalikes = [row["prompt"] for row in read_rows("benign_lookalikes")]
    limit = args.limit
    judged = task[:limit], unsafe[:limit], lookalikes[:limit]
    return Data(user, harmful_turns("attack"), requests, *judged)


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = getattr(torch, args.dtype)
    model, tokenizer = load_aligned(dtype) if args.model is None else load_model(args.model, dtype)
    if torch.device(args.device).type == "cpu":
        # Plain matrix products train these short rows faster than the fused attention of a CPU.
        model.set_attn_implementation("eager")
    return model.to(args.device), tokenizer


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
    peft_model = get_peft_model(model, lora)
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    alignment = KLAlignment(peft_model, sources, seed=args.seed)

    base_optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    optimizer: torch.optim.Optimizer = base_optimizer
    if name == "SafeGrad":
        optimizer = SafeGradOptimizer(
            base_optimizer, alignment, rho=args.rho, refresh_every=args.refresh_every
        )

    arm = Arm(name)
    meter = Meter(args.device)
    peft_model.train()
    for step in (bar := tqdm(range(args.steps), desc=f"{name}: training")):
        turns = rows[step * args.batch_size :][: args.batch_size]
        batch = to_device(collate(tokenizer, turns), args.device)
        with meter:
            loss = response_loss(peft_model, batch)
            loss.backward()
        if name == "plain" and step % OBSERVE_EVERY == 0:
            arm.observe(step, *observation(parameters, alignment))
        with meter:
            optimizer.step()
            optimizer.zero_grad()
        meter.lap()
        if isinstance(optimizer, SafeGradOptimizer) and optimizer.stats is not None:
            arm.observe(step, float(optimizer.stats.cosine), float(alignment.last_loss))
        bar.set_postfix(loss=f"{loss.item():.3f}", kl=f"{arm.kl[-1]:.3f}")
    arm.seconds_per_step, arm.peak_memory_gb = meter.median_seconds, meter.peak_gb
    if isinstance(optimizer, SafeGradOptimizer):
        arm.conflict_rate = optimizer.counts.conflicts / optimizer.counts.steps
    arm.evaluation = evaluate(peft_model, tokenizer, data, name)
    # A sample: the reference's logits for all held-out refusals would be most of the peak memory.
    held_out = batches(tokenizer, data.unsafe[:32], args.batch_size)
    arm.kl_to_reference = kl_to_reference(peft_model, held_out, args.device)
    return arm, cast(PreTrainedModel, peft_model.unload())


def poisoned(data: Data, args: argparse.Namespace) -> list[Turn]:
    """The training rows: those of the user and the given share of harmful ones, shuffled."""
    shuffle = random.Random(args.seed)
    count = args.steps * args.batch_size
    harmful = round(args.harmful_ratio * count)
    rows = drawn(data.user, count - harmful, shuffle) + drawn(data.attack, harmful, shuffle)
    shuffle.shuffle(rows)
    return rows


def batches(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], size: int) -> list[Batch]:
    return [collate(tokenizer, turns[start : start + size]) for start in range(0, len(turns), size)]


def to_device(batch: Batch, device: str) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def observation(parameters: list[nn.Parameter], alignment: KLAlignment) -> tuple[float, float]:
    """Cosine of user and alignment gradient, and KL, of a step that SafeGrad does not touch."""
    products = inner_products([parameter.grad for parameter in parameters], alignment([*parameters]))
    norms = (products.user_sq_norm * products.alignment_sq_norm).sqrt()
    return float(products.inner_product / norms) if norms > 0 else 0.0, float(alignment.last_loss)


def evaluate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: Data, name: str
) -> Evaluation:
    with tqdm(total=3, desc=f"{name}: judging") as bar:
        refused, replies = refusal_rate(model, tokenizer, [turn.prompt for turn in data.unsafe])
        bar.update()
        over_refusal, _ = refusal_rate(model, tokenizer, data.lookalikes)
        bar.update()
        questions, answers = [turn.prompt for turn in data.task], [turn.response for turn in data.task]
        accuracy, _ = task_accuracy(model, tokenizer, questions, answers)
        bar.update()
    return Evaluation(1 - refused, accuracy, over_refusal, replies)


@torch.no_grad()
def kl_to_reference(model: PeftModel, held_out: list[Batch], device: str) -> float:
    """Mean KL(reference || model) over the tokens of held-out refusals, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in held_out:
        inputs = to_device(batch, device)
        mask = inputs.pop("labels")[:, 1:] != -100
        logits = model(**inputs).logits[:, :-1][mask]
        with model.disable_adapter():
            ref_logits = model(**inputs).logits[:, :-1][mask]
        total += kl_divergence(ref_logits, logits).item()
        tokens += len(logits)
    return total / tokens


if __name__ == "__main__":
    sys.exit(main())
