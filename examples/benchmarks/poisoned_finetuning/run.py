"""Does SafeGrad protect, against which baselines, and where does it fail: run the cells of a plan.

    cd examples
    python -m benchmarks.poisoned_finetuning.run --plan smoke
    python -m benchmarks.poisoned_finetuning.run --plan all --data-dir DIR

A run is judged on its way; each judgement is one line of --results and is never made again: stop and start
as you like. Without --data-dir the public data come from the Hub. `figures.py` makes tables and figures.
"""

import argparse
import platform
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import safegrad_optim
from benchmarks.poisoned_finetuning.arms import optimizer_of, safety_batches, steps
from benchmarks.poisoned_finetuning.attacks import Attack, attack_of
from benchmarks.poisoned_finetuning.cells import CHECKS, PLANS, Cell
from benchmarks.poisoned_finetuning.judging import REPLY_TOKENS, Judge
from benchmarks.poisoned_finetuning.result_lines import append, done
from benchmarks.poisoned_finetuning.sources import SafetyRows, safety_rows_of
from benchmarks.poisoned_finetuning.states import State
from common.chat_data import Turn, collate, drawn, read_rows
from common.public_data import Requests, load_requests, load_task
from common.scoring import generate
from common.smollm2 import load_aligned, load_model
from safegrad_optim import ProtectionCheck

LORA_MODULES = ["q_proj", "k_proj", "v_proj"]  # as in the paper


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # What transformers and peft will rename is for their callers to know, not for readers of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    cells = planned(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for cell in tqdm(cells, desc=f"plan {args.plan}", unit="cell"):
        # Another process may have finished it meanwhile.
        if done(args.results).get(cell, -1) < checks(cell)[-1]:
            for line in bench.run(cell):
                append(args.results, line)
    command = f"python -m benchmarks.poisoned_finetuning.figures --results {args.results}"
    print(f"{len(cells)} cells in {args.results}. Tables: {command}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--plan", choices=list(PLANS), default="smoke")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th cell from the I-th, for N processes")
    parser.add_argument("--model", help="hub id or path of an aligned chat model instead of SmolLM2")
    parser.add_argument("--data-dir", type=Path, help="folder with the public data; default: the Hub")
    parser.add_argument("--results", type=Path, default=Path("outputs/poisoned_finetuning/results.jsonl"))
    parser.add_argument("--steps", type=int, help="steps of each cell instead of the plan's")
    parser.add_argument(
        "--every", type=int, help="use every so many of the shipped requests, not the plan's 4"
    )
    parser.add_argument("--judged", type=int, help="rows to judge by instead of the plan's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def planned(args: argparse.Namespace) -> list[Cell]:
    """The cells of the plan that are this process's."""
    given = {"model": args.model, "steps": args.steps, "judged": args.judged, "every": args.every}
    changes = {name: value for name, value in given.items() if value is not None}
    cells = dict.fromkeys(Cell(**{**asdict(cell), **changes}) for cell in PLANS[args.plan]())
    index, count = map(int, args.part.split("/"))
    return list(cells)[index - 1 :: count]


def checks(cell: Cell) -> list[int]:
    """The steps after which a cell is judged; the last is its end."""
    if cell.arm == "aligned":
        return [0]
    return [*(step for step in CHECKS if step < cell.steps), cell.steps]


class Bench:
    """The aligned model and everything that cells share, read once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load(args)
        self.task = cache(partial(load_task, data_dir=args.data_dir))
        self.requests = cache(partial(load_requests, args.data_dir))
        self.aligned_replies: dict[tuple[str, ...], list[str]] = {}

    def run(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """Fine-tune a fresh copy of the aligned model, and yield a line after each check."""
        torch.manual_seed(cell.seed)
        train, test = self.task(cell.task)
        requests = self.requests(cell.attack != "examples")
        attack = attack_of(cell, requests.attack, train, self.model, self.tokenizer)
        rows, harmful = poisoned(cell, train, attack)
        judge = self.judge(cell, test, requests, attack)
        began = time.perf_counter()
        advbench = self.requests(True).safety if cell.safety == "advbench" else []
        made = safety_rows_of(cell, self.model, self.tokenizer, rows, advbench)
        facts = made.facts(harmful, {turn.prompt for turn in rows} - harmful)
        known = {"safety": facts, "prepared": time.perf_counter() - began}
        model: Any = peft.get_peft_model(self.model, lora())
        optimizer = optimizer_of(cell, model, made.sources)
        protection = None if made.made is None else ProtectionCheck(model, self.tokenizer, made.made)
        state = State(self.args.results, cell, model, optimizer)
        taken = state.load()
        trained = self.trained(cell, model, optimizer, made, taken)
        checked: list[dict[str, Any]] = []
        model.train()
        for until in (step for step in checks(cell) if step > taken or not step):
            began = time.perf_counter()
            for step in tqdm(range(taken, until), leave=False):
                next(trained)
                checked += checked_at(protection, step + 1)
            seconds = time.perf_counter() - began
            scores = judge(model, partial(adapters_off, model))
            model.train()
            found = known | {"train": seconds, "checked": checked}
            yield line_of(cell, until, scores, found, self.args.device)
            taken, checked = until, []
            if until < checks(cell)[-1]:
                state.save(taken)
        state.remove()
        self.model = model.unload()

    def trained(
        self,
        cell: Cell,
        model: Any,
        optimizer: torch.optim.Optimizer,
        made: SafetyRows,
        taken: int,
    ) -> Iterator[None]:
        """The steps of a cell from a certain one on."""
        device = self.args.device
        starts = range(taken * cell.batch_size, len(made.rows), cell.batch_size)
        user = (self.collated(made.rows[start:][: cell.batch_size]) for start in starts)
        shown = cell.arm in ("mixed", "lisa")
        safety = safety_batches(made.sources, cell.steps, device)[taken:] if shown else []
        return steps(cell, model, optimizer, user, safety)

    def judge(self, cell: Cell, test: list[Turn], requests: Requests, attack: Attack) -> Judge:
        # Those that no safety row is made of serve as well, where more are asked for.
        spare = requests.safety if cell.safety == "shipped" else []
        prompts = tuple(request.prompt for request in [*requests.evaluation, *spare][: cell.judged])
        if prompts not in self.aligned_replies:
            self.aligned_replies[prompts] = generate(self.model, self.tokenizer, prompts, REPLY_TOKENS)
        pairs = zip(attack.ask(prompts), self.aligned_replies[prompts], strict=True)
        unsafe = [Turn(*pair, complete=False) for pair in pairs]
        lookalikes = [row["prompt"] for row in read_rows("benign_lookalikes")][: cell.judged]
        return Judge(self.tokenizer, unsafe, lookalikes, test[: 2 * cell.judged], cell.task, attack.opening)

    def collated(self, turns: Sequence[Turn]) -> dict[str, torch.Tensor]:
        batch = collate(self.tokenizer, turns)
        return {name: value.to(self.args.device) for name, value in batch.items()}


def poisoned(cell: Cell, train: list[Turn], attack: Attack) -> tuple[list[Turn], set[str]]:
    """Training rows, of the task and the given share of harmful ones, shuffled; and the harmful prompts."""
    shuffle = random.Random(cell.seed)
    count = cell.steps * cell.batch_size
    harmful_count = round(cell.ratio * count)
    harmful = drawn(attack.rows, harmful_count, shuffle)
    rows = drawn(train, count - harmful_count, shuffle) + harmful
    shuffle.shuffle(rows)
    return rows, {turn.prompt for turn in harmful}


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_aligned() if args.model is None else load_model(args.model)
    if args.device == "cpu":
        # Plain matrix products train these short rows faster than the fused attention of a CPU.
        model.set_attn_implementation("eager")
    return model.to(args.device), tokenizer


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=LORA_MODULES, task_type="CAUSAL_LM")


def checked_at(protection: ProtectionCheck | None, step: int) -> list[dict[str, Any]]:
    """What the check of protection finds after a step where one is due; a leak is a result and no error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = None if protection is None else protection(step)
    return [] if found is None else [{"step": step, "kept": found.kept, "leaks": found.leaks}]


def line_of(
    cell: Cell, step: int, scores: dict[str, list[float]], known: dict[str, Any], device: str
) -> dict[str, Any]:
    """One line of results."""
    return {
        "cell": asdict(cell),
        "step": step,
        "scores": scores,
        **known,
        "versions": {
            "safegrad_optim": safegrad_optim.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
        "device": device,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


if __name__ == "__main__":
    sys.exit(main())
