"""What the quickstart shows: replies side by side, one table, one figure, one file of numbers."""

import json
import platform
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import safegrad_optim
from common.style import plt, save

__all__ = ["ROWS", "Arm", "Evaluation", "show"]


class Evaluation(NamedTuple):
    """How a model behaves on held-out rows; rates are between 0 and 1."""

    refused: list[bool]
    """Which unsafe requests are refused."""
    task_accuracy: float
    over_refusal: float
    """Share of harmless look-alikes that are refused."""
    replies: list[str]
    """Replies to the unsafe requests."""

    @property
    def harmful_score(self) -> float:
        """Share of unsafe requests that are not refused."""
        return 1 - sum(self.refused) / len(self.refused)


@dataclass
class Arm:
    """One column of the comparison: a model before, or after, one way of fine-tuning it."""

    name: str
    evaluation: Evaluation | None = None
    refusals_kept: float = 1.0
    kl_to_reference: float = 0.0
    conflict_rate: float | None = None
    seconds_per_step: float | None = None
    peak_memory_gb: float | None = None
    steps: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)

    def observe(self, step: int, cosine: float, kl: float) -> None:
        """Record a point of the curves."""
        self.steps.append(step)
        self.cosine.append(cosine)
        self.kl.append(kl)


ROWS = (
    ("harmful score (unsafe requests not refused)", "harmful_score", "{:.2f}"),
    ("refusals kept (of those before)", "refusals_kept", "{:.2f}"),
    ("task accuracy (held-out rows)", "task_accuracy", "{:.2f}"),
    ("over-refusal (harmless look-alikes refused)", "over_refusal", "{:.2f}"),
    ("KL to the reference (nats a refusal token)", "kl_to_reference", "{:.3f}"),
    ("conflict rate (share of steps)", "conflict_rate", "{:.2f}"),
    ("seconds a step (median)", "seconds_per_step", "{:.2f}"),
    ("peak memory (GB)", "peak_memory_gb", "{:.2f}"),
)


def show(arms: list[Arm], prompts: list[str], args: Namespace) -> None:
    """Print replies and one table, save a figure and all numbers; the first arm is the aligned model."""
    folder: Path = args.output_dir
    before = arms[0].evaluation.refused
    for arm in arms:
        kept = [now for now, refused in zip(arm.evaluation.refused, before, strict=True) if refused]
        arm.refusals_kept = sum(kept) / max(len(kept), 1)
    print_replies(arms, prompts)
    print_table(arms)
    folder.mkdir(parents=True, exist_ok=True)
    save_curves(arms[1:], folder / "curves.svg")
    save_results(arms, vars(args), folder / "results.json")
    print(f"\n{time.perf_counter() - args.started:.0f} s. Figure and numbers: {folder}")


def print_table(arms: list[Arm]) -> None:
    """Print one Markdown table, a column for each arm."""
    width = max(len(label) for label, *_ in ROWS)
    print(f"\n| {'':{width}} | " + " | ".join(f"{arm.name:>8}" for arm in arms) + " |")
    print(f"|{'-' * (width + 2)}|" + "|".join("-" * 9 + ":" for _ in arms) + "|")
    for label, name, form in ROWS:
        cells = [_cell(arm, name, form) for arm in arms]
        print(f"| {label:{width}} | " + " | ".join(f"{cell:>8}" for cell in cells) + " |")


def print_replies(arms: list[Arm], prompts: list[str], count: int = 3) -> None:
    """Print the openings of the arms' replies to some unsafe requests, spread over all."""
    for index in range(0, len(prompts), max(1, -(-len(prompts) // count))):
        print(f"\n{prompts[index]}")
        for arm in arms:
            print(f"  {arm.name:>8}: {' '.join(arm.evaluation.replies[index].split())} ...")


def save_curves(arms: list[Arm], path: Path) -> None:
    """Plot cosine of user and alignment gradient, and KL to the reference, over steps."""
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6))
    for arm, marker in zip(arms, ("o", ""), strict=True):
        top.plot(arm.steps, arm.cosine, label=arm.name, marker=marker, markersize=3)
        bottom.plot(arm.steps, arm.kl, label=arm.name, marker=marker, markersize=3)
    top.axhline(0, color="grey", linewidth=0.8)
    top.set_ylabel("cos(g_user, g_align)\nbelow 0: conflict")
    bottom.set_ylabel("KL(reference || model)\nnats a token, safety batch")
    bottom.set_yscale("symlog", linthresh=1e-2)
    bottom.set_xlabel("step")
    top.legend()
    save(figure, path)


def save_results(arms: list[Arm], options: dict[str, Any], path: Path) -> None:
    """Write every number of the table and the curves, the options and the versions as JSON."""
    columns = {
        arm.name: {name: _value(arm, name) for _, name, _ in ROWS}
        | {"steps": arm.steps, "cosine": arm.cosine, "kl": arm.kl}
        for arm in arms
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safegrad_optim": safegrad_optim.__version__,
    }
    given = {key: str(value) for key, value in options.items() if key != "started"}
    content = {"options": given, "versions": versions}
    path.write_text(json.dumps(content | {"arms": columns}, indent=1) + "\n", encoding="utf-8")


def _value(arm: Arm, name: str) -> float | None:
    source = arm if hasattr(arm, name) else arm.evaluation
    value: float | None = getattr(source, name)
    return value


def _cell(arm: Arm, name: str, form: str) -> str:
    value = _value(arm, name)
    return "-" if value is None else form.format(value)
