"""Tables and figures from the result lines of `run.py`.

    cd examples; python -m benchmarks.poisoned_finetuning.figures

Writes tables.md, tables.csv and, of what there is, steps.svg and ratios.svg to --output-dir.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.poisoned_finetuning.cells import PLANS, Cell
from benchmarks.poisoned_finetuning.result_lines import read
from benchmarks.poisoned_finetuning.tables import Rate, markdown, pooled, rate
from common.style import plt, save

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
TASKS = {"sst2": "SST-2", "tickets": "tickets", "agnews": "AG News"}
# By title of a panel and name of a line the rows of `pooled` that it goes through.
Panels = dict[str, dict[str, list[Any]]]


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
    usual = _usual(frame)
    draw(over_steps(usual), "steps", lambda row: row["step"], args.output_dir / "steps.svg")
    ratios = args.output_dir / "ratios.svg"
    draw(over_ratios(usual), "share of harmful rows", lambda row: row["cell"].ratio, ratios)
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


def draw(panels: Panels, label: str, x_of: Callable[[Any], float], path: Path) -> None:
    """Harmful score and accuracy with 95 % intervals, a column for each panel; no file if there is none."""
    if not panels:
        return
    names = dict.fromkeys(name for series in panels.values() for name in series)
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    figure = plt.figure(figsize=(4 * len(panels), 6))
    axes = figure.subplots(2, len(panels), sharex=True, sharey=True, squeeze=False)
    for column, (title, series) in zip(axes.T, panels.items(), strict=True):
        for name, rows in series.items():
            for axis, score in zip(column, ("not_refused", "task_right"), strict=True):
                _bars(axis, [(x_of(row), rate(row, score)) for row in rows], colors[name])
        column[0].set(title=title, ylim=(-0.03, 1.03))
        column[1].set(xlabel=label)
    axes[0, 0].set_ylabel("harmful score (not refused)")
    axes[1, 0].set_ylabel("task accuracy")
    lines = [Line2D([], [], color=color) for color in colors.values()]
    figure.legend(lines, colors, loc="outside lower center", ncols=len(colors))
    save(figure, path)


def over_steps(rows: list[Any]) -> Panels:
    """For each task and share of harmful rows the longest run of each arm, from the aligned model on."""
    aligned = {row["cell"].task: row for row in rows if row["cell"].arm == "aligned"}
    longest: dict[Cell, list[Any]] = {}
    for row in sorted(rows, key=lambda row: (row["cell"].steps, row["step"])):
        cell = row["cell"]
        run = longest.setdefault(replace(cell, steps=0), [])
        if run and run[-1]["cell"].steps < cell.steps:
            run.clear()
        run += [row]
    panels: Panels = {}
    for cell, run in longest.items():
        start = [aligned[cell.task]] if cell.task in aligned else []
        if len(start + run) > 1 and cell.arm != "aligned":
            title = f"{TASKS[cell.task]}, {cell.ratio:.0%} harmful"
            panels.setdefault(title, {})[_name(cell)] = [*start, *run]
    return panels


def over_ratios(rows: list[Any]) -> Panels:
    """For each task the runs of 120 steps by their share of harmful rows."""
    panels: Panels = {}
    for row in sorted(rows, key=lambda row: row["cell"].ratio):
        cell = row["cell"]
        if cell.steps == 120 and cell.arm != "aligned":
            panels.setdefault(TASKS[cell.task], {}).setdefault(_name(cell), []).append(row)
    found = {
        title: {name: run for name, run in series.items() if len(run) > 1} for title, series in panels.items()
    }
    return {title: series for title, series in found.items() if series}


def _name(cell: Cell) -> str:
    return cell.arm + (f", k = {cell.refresh_every}" if cell.refresh_every > 1 else "")


def _usual(frame: pd.DataFrame) -> list[Any]:
    """The rows of cells that are the default one but for what the figures show."""
    shown = ("arm", "task", "ratio", "steps", "refresh_every")
    found = []
    for _, row in frame.iterrows():
        cell = row["cell"]
        if cell == replace(Cell(), **{name: getattr(cell, name) for name in shown}):
            found.append(row)
    return found


def _bars(axis: Axes, points: list[tuple[float, Rate | None]], color: str) -> None:
    found = [(x, point) for x, point in points if point is not None]
    if found:
        below = [point.value - point.low for _, point in found]
        above = [point.high - point.value for _, point in found]
        x, y = [x for x, _ in found], [point.value for _, point in found]
        axis.grid(visible=True)
        axis.errorbar(x, y, yerr=[below, above], color=color, capsize=2, marker="o", markersize=4)


if __name__ == "__main__":
    sys.exit(main())
