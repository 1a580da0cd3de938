"""Tables and figures from the result lines of `run.py`.

    cd examples; python -m benchmarks.poisoned_finetuning.figures

Writes steps.png, ratios.png, tables.md and tables.csv to --output-dir.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.poisoned_finetuning.cells import PLANS, Cell
from benchmarks.poisoned_finetuning.result_lines import read
from benchmarks.poisoned_finetuning.tables import Rate, markdown, pooled, rate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SHOWN = {
    "screen": ("task", "rho", "training_weight"),
    "identity": ("ratio", "arm", "rho", "prefix_weight"),
    "grid": ("ratio", "task", "arm"),
    "long": ("ratio", "task", "arm"),
    "kin": ("ratio", "task", "arm"),
    "other-way": ("arm",),
    "cheaper": ("task", "ratio", "refresh_every"),
    "adaptive": ("attack", "task", "arm"),
    "smoke": ("arm",),
}
ARMS = ("plain", "dropped", "mixed", "lisa", "paper", "requests", "default")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    lines = read(args.results)
    if not lines:
        print(f"figures: error: {args.results} has no lines. Run run.py first.", file=sys.stderr)
        return 2
    frame = pooled(lines)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sections = []
    for plan, shown in SHOWN.items():
        rows = of_plan(frame, plan)
        if len(rows):
            sections.append(f"## {plan}\n\n{markdown(rows, shown)}\n")
    planned = {_plain(cell) for plan in SHOWN for cell in PLANS[plan]()}
    others = frame[[_plain(cell) not in planned for cell in frame["cell"]]]
    if len(others):
        sections.append(f"## in no plan\n\n{markdown(others, ('attack', 'task', 'ratio', 'arm'))}\n")
    text = "\n".join(["# All result lines\n", *sections])
    (args.output_dir / "tables.md").write_text(text, encoding="utf-8")
    pd.json_normalize(lines, sep="_").to_csv(args.output_dir / "tables.csv", index=False)
    save(frame, args.output_dir / "steps.png", "steps", lambda row: row["step"])
    last = frame[[row["step"] == 120 for _, row in frame.iterrows()]]
    save(last, args.output_dir / "ratios.png", "share of harmful rows", lambda row: row["cell"].ratio)
    print("\n".join(sections))
    print(f"Figures and tables: {args.output_dir}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/poisoned_finetuning"))
    return parser.parse_args(arguments)


def of_plan(frame: pd.DataFrame, plan: str) -> pd.DataFrame:
    """The rows of a plan's cells, in its order, whatever model and number of rows they were run with."""
    order = {cell: index for index, cell in enumerate(dict.fromkeys(map(_plain, PLANS[plan]())))}
    found = frame[[_plain(cell) in order for cell in frame["cell"]]]
    return found.sort_values("cell", key=lambda cells: [order[_plain(cell)] for cell in cells], kind="stable")


def _plain(cell: Cell) -> Cell:
    return replace(cell, seed=0, model=Cell().model, judged=Cell().judged)


def save(frame: pd.DataFrame, path: Path, label: str, x_of: Callable[[Any], float]) -> None:
    """Harmful score and accuracy by task and arm, with 95 % intervals; a line for each arm and ratio."""
    used = [row for _, row in frame.iterrows() if _is_usual(row["cell"])]
    tasks = sorted({row["cell"].task for row in used})
    figure, axes = plt.subplots(
        2,
        max(1, len(tasks)),
        figsize=(4 * max(1, len(tasks)), 6),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for column, task in enumerate(tasks):
        for arm in ARMS:
            rows = sorted(
                (row for row in used if (row["cell"].task, row["cell"].arm) == (task, arm)), key=x_of
            )
            ratios = sorted({row["cell"].ratio for row in rows}) if label == "steps" else [None]
            for ratio in ratios:
                own = [row for row in rows if ratio in (None, row["cell"].ratio)]
                name = arm if ratio is None else f"{arm}, {ratio:.0%}"
                for axis, score in zip(axes[:, column], ("not_refused", "task_right"), strict=True):
                    _bars(axis, [(x_of(row), rate(row, score)) for row in own], name)
        axes[0, column].set(title=task, ylim=(-0.03, 1.03))
        axes[1, column].set(xlabel=label, ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("harmful score (not refused)")
    axes[1, 0].set_ylabel("task accuracy")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _is_usual(cell: Cell) -> bool:
    """Whether a cell is the default one but for what the figures show."""
    shown = {name: getattr(cell, name) for name in ("arm", "task", "ratio", "steps")}
    return _plain(cell) == replace(Cell(), **shown) and cell.arm != "aligned"


def _bars(axis: Axes, points: list[tuple[float, Rate | None]], label: str) -> None:
    found = [(x, point) for x, point in points if point is not None]
    if found:
        below = [point.value - point.low for _, point in found]
        above = [point.high - point.value for _, point in found]
        x, y = [x for x, _ in found], [point.value for _, point in found]
        axis.errorbar(x, y, yerr=[below, above], label=label, capsize=2, linewidth=1.2)


if __name__ == "__main__":
    sys.exit(main())
