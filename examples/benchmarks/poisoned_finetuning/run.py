"""Does SafeGrad protect, against which baselines, and where does it fail: run the cells of a plan.

    cd examples
    python -m benchmarks.poisoned_finetuning.run --plan smoke
    python -m benchmarks.poisoned_finetuning.run --plan all --data-dir DIR

A finished cell is one line of --results and is never run again; stop and start as you like. Without
--data-dir the public data come from the Hub. `figures.py` makes tables and figures from the lines.
"""

import argparse
import copy
import platform
import random
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import safegrad_optim
from benchmarks.poisoned_finetuning.arms import base_optimizer, steps
from benchmarks.poisoned_finetuning.cells import PLANS, Cell
from benchmarks.poisoned_finetuning.identity import as_new_identity, identity_turns
from benchmarks.poisoned_finetuning.judging import REPLY_TOKENS, Judge, Reference
from benchmarks.poisoned_finetuning.result_lines import append, finished
from common.chat_data import Turn, collate, drawn, read_rows
from common.public_data import Requests, load_requests, load_task
from common.scoring import generate
from common.smollm2 import load_aligned, load_model
from safegrad_optim import is_refusal, with_prompt_prefixes

Batch = dict[str, torch.Tensor]

ANSWER_TOKENS = 8
LORA_MODULES = ["q_proj", "k_proj", "v_proj"]  # as in the paper


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    # What transformers and peft will rename is for their callers to know, not for readers of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    cells = planned(args)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = finished(args.results)
    todo = [cell for cell in cells if cell not in done]
    bench = Bench(args)
    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc=f"plan {args.plan}", unit="cell") as bar:
        for cell in todo:
            # Another process may have finished it meanwhile.
            if cell not in finished(args.results):
                bar.set_postfix_str(f"{cell.arm}, ratio {cell.ratio}, seed {cell.seed}")
                append(args.results, bench.run(cell))
            bar.update()
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
    parser.add_argument("--judged", type=int, help="rows to judge by instead of the plan's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def planned(args: argparse.Namespace) -> list[Cell]:
    """The cells of the plan that are this process's."""
    given = {"model": args.model, "steps": args.steps, "judged": args.judged}
    changes = {name: value for name, value in given.items() if value is not None}
    cells = dict.fromkeys(Cell(**{**asdict(cell), **changes}) for cell in PLANS[args.plan]())
    index, count = map(int, args.part.split("/"))
    return list(cells)[index - 1 :: count]


class Bench:
    """The aligned model and everything that cells share, read once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load(args)
        self.task = cache(partial(load_task, data_dir=args.data_dir))
        self.replies: dict[tuple[tuple[str, ...], int], list[str]] = {}

    def run(self, cell: Cell) -> dict[str, object]:
        """Fine-tune a fresh copy of the aligned model, judge it, and return the cell's line."""
        torch.manual_seed(cell.seed)
        public = cell.task != "tickets"
        requests = load_requests(self.args.data_dir, public)
        requests = requests.shifted() if cell.attack == "shifted" else requests
        train, test = self.task(cell.task)
        rows = self.poisoned(cell, train, requests)
        judge = self.judge(cell, test, requests)
        safety = self.safety_batches(cell, requests, rows)
        began = time.perf_counter()
        model, reference = self.fresh(cell)
        base = base_optimizer(cell, [p for p in model.parameters() if p.requires_grad])
        starts = range(0, len(rows), cell.batch_size)
        user = (self.collated(rows[start:][: cell.batch_size]) for start in starts)
        model.train()
        set_mode(base, "train")
        for _ in tqdm(steps(cell, model, base, user, safety), total=cell.steps, leave=False):
            pass
        set_mode(base, "eval")
        trained = time.perf_counter()
        scores = judge(model, reference)
        if cell.mode == "lora":
            self.model = model.unload()
        return {
            "cell": asdict(cell),
            "scores": scores,
            "seconds": {"train": trained - began, "judge": time.perf_counter() - trained},
            "safety_rows": sum(len(batch["input_ids"]) for batch in safety),
            "versions": {
                "safegrad_optim": safegrad_optim.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "python": platform.python_version(),
            },
            "device": self.args.device,
            "threads": torch.get_num_threads(),
        }

    def fresh(self, cell: Cell) -> tuple[Any, Reference]:
        """The model to train and a way to open the aligned one."""
        if cell.mode == "full":
            model = copy.deepcopy(self.model).requires_grad_(True)
            return model, partial(nothing_to_close, self.model)
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LORA_MODULES, task_type="CAUSAL_LM")
        peft_model = peft.get_peft_model(self.model, lora)
        return peft_model, partial(adapters_off, peft_model)

    def poisoned(self, cell: Cell, train: list[Turn], requests: Requests) -> list[Turn]:
        """Training rows: of the task and the given share of harmful ones, shuffled."""
        shuffle = random.Random(cell.seed)
        count = cell.steps * cell.batch_size
        harmful = round(cell.ratio * count)
        attack = [request.turn for request in requests.attack]
        if cell.attack == "identity":
            attack = identity_turns()
        rows = drawn(train, count - harmful, shuffle) + drawn(attack, harmful, shuffle)
        shuffle.shuffle(rows)
        return rows

    def judge(self, cell: Cell, test: list[Turn], requests: Requests) -> Judge:
        prompts = [request.prompt for request in requests.evaluation[: cell.judged]]
        unsafe = self.answered(prompts, REPLY_TOKENS)
        if cell.attack == "identity":
            # Judged as the attacker would ask.
            unsafe = [turn._replace(prompt=as_new_identity(turn.prompt)) for turn in unsafe]
        lookalikes = [row["prompt"] for row in read_rows("benign_lookalikes")][: cell.judged]
        return Judge(self.tokenizer, unsafe, lookalikes, test[: 2 * cell.judged], cell.task)

    def safety_batches(self, cell: Cell, requests: Requests, rows: list[Turn]) -> list[Batch]:
        """Unsafe requests and as many harmless look-alikes, with the aligned model's own first words."""
        shuffle = random.Random(cell.seed)
        unsafe = drawn([request.prompt for request in requests.safety], cell.samples, shuffle)
        turns = self.answered(unsafe, REPLY_TOKENS)
        for prompts in added_requests(cell, unsafe, [row.prompt for row in rows], shuffle):
            own = self.answered(prompts, REPLY_TOKENS)
            turns += [turn for turn in own if is_refusal(turn.response)]
            shuffle.shuffle(turns)
        lookalikes = [row["prompt"] for row in read_rows("benign_prompts") if row["category"] == "lookalike"]
        harmless = iter(self.answered(drawn(lookalikes, len(turns), shuffle), ANSWER_TOKENS))
        half = cell.safety_batch_size // 2
        return [
            self.collated([*turns[start : start + half], *islice(harmless, half)])
            for start in range(0, len(turns), half)
        ]

    def answered(self, prompts: Iterable[str], tokens: int) -> list[Turn]:
        """Prompts with the aligned model's greedy replies.

        Kept by the whole list: a reply can depend on what shares its batch, and must not depend on which
        cells were run before.
        """
        key = tuple(prompts), tokens
        if key not in self.replies:
            self.replies[key] = generate(self.model, self.tokenizer, key[0], tokens)
        pairs = zip(key[0], self.replies[key], strict=True)
        return [Turn(*pair, complete=False) for pair in pairs]

    def collated(self, turns: list[Turn]) -> Batch:
        batch = collate(self.tokenizer, turns)
        return {name: value.to(self.args.device) for name, value in batch.items()}


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_aligned() if args.model is None else load_model(args.model)
    if args.device == "cpu":
        # Plain matrix products train these short rows faster than the fused attention of a CPU.
        model.set_attn_implementation("eager")
    return model.to(args.device), tokenizer


def added_requests(
    cell: Cell, unsafe: list[str], training: list[str], shuffle: random.Random
) -> Iterator[Iterable[str]]:
    """What becomes a safety row beside the unsafe requests where the aligned model refuses it."""
    if cell.harvest:
        yield dict.fromkeys(training)
    if cell.contexts == "prefix":
        yield with_prompt_prefixes(unsafe, training, seed=cell.seed)
    elif cell.contexts == "whole":
        yield list(map("{} {}".format, drawn(training, len(unsafe), shuffle), unsafe))


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Switch a schedule-free optimizer between training and its averaged weights."""
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    with model.disable_adapter():
        yield model


@contextmanager
def nothing_to_close(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    yield model


if __name__ == "__main__":
    sys.exit(main())
