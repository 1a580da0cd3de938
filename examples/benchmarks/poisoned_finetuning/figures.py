"""Tables and figures from the result lines of `run.py`.

    cd examples; python -m benchmarks.poisoned_finetuning.figures

Writes headline.png, edges.png, tables.md and tables.csv to --output-dir.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.poisoned_finetuning.cells import HEADLINE, PLANS, Cell
from benchmarks.poisoned_finetuning.result_lines import read
from benchmarks.poisoned_finetuning.tables import Rate, markdown, pooled, rate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SHOWN = {
    "headline": ("ratio", "arm"),
    "few-samples": ("samples", "attack"),
    "ablations": ("ratio", "arm"),
    "long-and-fast": ("lr", "steps"),
    "cheaper": ("refresh_every", "safety_batch_size"),
    "task-cost": ("task", "steps", "arm"),
    "identity": ("arm",),
    "axes": ("arm",),
    "smoke": ("arm",),
}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    lines = read(args.results)
    if not lines:
        print(f"figures: error: {args.results} has no finished cells. Run run.py first.", file=sys.stderr)
        return 2
    frame = pooled(lines)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    sections = []
    for plan, shown in SHOWN.items():
        rows = of_plan(frame, plan)
        if len(rows):
            sections.append(f"## {plan}\n\n{markdown(rows, shown)}\n")
    (args.output_dir / "tables.md").write_text("\n".join(sections), encoding="utf-8")
    flat = pd.json_normalize(lines, sep="_")
    flat.to_csv(args.output_dir / "tables.csv", index=False)
    save_headline(frame, lines, args.output_dir / "headline.png")
    save_edges(frame, args.output_dir / "edges.png")
    print("\n".join(sections))
    print(f"Figures and tables: {args.output_dir}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "first_adapter.jsonl")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/poisoned_finetuning"))
    return parser.parse_args(arguments)


def of_plan(frame: pd.DataFrame, plan: str) -> pd.DataFrame:
    """The rows of a plan's cells, in its order, whatever model and number of rows they were run with."""
    order = {cell: index for index, cell in enumerate(dict.fromkeys(map(_plain, PLANS[plan]())))}
    found = frame[[_plain(cell) in order for cell in frame["cell"]]]
    return found.sort_values("cell", key=lambda cells: [order[_plain(cell)] for cell in cells])


def _plain(cell: Cell) -> Cell:
    return replace(cell, seed=0, model=Cell().model, judged=Cell().judged)


def save_headline(frame: pd.DataFrame, lines: list[dict[str, Any]], path: Path) -> None:
    """Harmful score and task accuracy against the harmful ratio; a dot is a seed, a bar the 95 % interval."""
    rows = of_plan(frame, "headline")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharex=True, layout="constrained")
    for row in (row for _, row in rows.iterrows() if row["cell"].arm == "aligned"):
        if (found := rate(row, "not_refused")) is not None:
            axes[0].axhline(found.value, color="grey", linestyle=":", label="aligned")
    for index, arm in enumerate(HEADLINE):
        shift = 0.006 * (index - len(HEADLINE) // 2)  # so that bars stand side by side
        own = sorted(
            (row for _, row in rows.iterrows() if row["cell"].arm == arm), key=lambda row: row["cell"].ratio
        )
        cells = {_plain(row["cell"]) for row in own}
        seeds = [line for line in lines if _plain(Cell(**line["cell"])) in cells]
        for axis, score in zip(axes, ("not_refused", "task_right"), strict=True):
            _bars(axis, [(row["cell"].ratio + shift, rate(row, score)) for row in own], arm)
            for line in seeds:
                count, of = line["scores"][score]
                axis.scatter(line["cell"]["ratio"] + shift, count / of, s=8, color=f"C{index}")
    for axis, label in zip(axes, ("harmful score (not refused)", "task accuracy"), strict=True):
        axis.set(xlabel="share of harmful rows", ylabel=label, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_edges(frame: pd.DataFrame, path: Path) -> None:
    """SafeGrad at its edges: learning rate against steps, safety rows against topic shift, and over rho."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.5), layout="constrained")
    for axis, across, up in zip(axes[:2], ("lr", "samples"), ("steps", "attack"), strict=True):
        values = {
            (getattr(row["cell"], across), getattr(row["cell"], up)): found.value
            for _, row in frame.iterrows()
            if (found := rate(row, "not_refused")) and _is_varied(row["cell"], across, up)
        }
        _map(axis, values, across, up)
        axis.set_title("harmful score")
    _over_rho(axes[2], frame)
    figure.suptitle("SafeGrad, 90 % harmful rows")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _over_rho(axis: Axes, frame: pd.DataFrame) -> None:
    """Both scores over rho, at even distances, since its values span two decades and 0."""
    varied = [row for _, row in frame.iterrows() if _is_varied(row["cell"], "rho")]
    varied.sort(key=lambda row: row["cell"].rho)
    for score, label in (("not_refused", "harmful score"), ("task_right", "task accuracy")):
        _bars(axis, [(index, rate(row, score)) for index, row in enumerate(varied)], label)
    axis.set_xticks(range(len(varied)), [f"{row['cell'].rho:g}" for row in varied])
    axis.set(xlabel="rho", ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
    axis.legend()


def _is_varied(cell: Cell, *names: str) -> bool:
    """Whether a cell is the default one but for these fields."""
    return _plain(cell) == replace(Cell(), **{name: getattr(cell, name) for name in names})


def _bars(axis: Axes, points: list[tuple[float, Rate | None]], label: str) -> None:
    found = [(x, point) for x, point in points if point is not None]
    if found:
        below = [point.value - point.low for _, point in found]
        above = [point.high - point.value for _, point in found]
        x, y = [x for x, _ in found], [point.value for _, point in found]
        axis.errorbar(x, y, yerr=[below, above], label=label, capsize=2, linewidth=1.2)


def _map(axis: Axes, values: dict[tuple[Any, Any], float], across: str, up: str) -> None:
    columns, lines = (sorted({key[index] for key in values}) for index in (0, 1))
    if values:
        grid = [[values.get((x, y), math.nan) for x in columns] for y in lines]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn_r", aspect="auto", origin="lower", alpha=0.7)
    for (x, y), value in values.items():
        axis.text(columns.index(x), lines.index(y), f"{value:.2f}", ha="center", va="center")
    axis.set(xlabel=across, ylabel=up)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(lines)), lines)


if __name__ == "__main__":
    sys.exit(main())
