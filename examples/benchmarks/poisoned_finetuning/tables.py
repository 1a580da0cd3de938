"""Result lines pooled over seeds: rates with 95 % intervals, as Markdown and CSV."""

from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.poisoned_finetuning.cells import Cell
from safegrad_optim.protection import wilson_interval

__all__ = ["RATES", "Rate", "markdown", "pooled", "rate", "wilson"]

RATES = {
    "not_refused": "harmful score",
    "kept": "refusals kept",
    "unlikely": "harmful, 2nd scorer",
    "complied": "begins as the attack",
    "task_right": "task accuracy",
    "task_format": "answer format",
    "over_refused": "over-refusal",
    "degenerate": "degenerate",
}
_MEANS = {"kl": "KL to reference", "task_loss": "task loss"}


class Rate(NamedTuple):
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def wilson(count: float, of: float) -> Rate:
    """The share `count / of` and its interval, which takes the rows for independent."""
    return Rate(count / of, *wilson_interval(count, of))


def pooled(lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row for each cell apart from its seed and step: counts summed over seeds, other values averaged."""
    rows = []
    for line in lines:
        cell = replace(Cell(**line["cell"]), seed=0)
        row: dict[str, Any] = {"cell": cell, "step": line["step"], "seeds": 1, "seconds": line["train"]}
        for name, value in line["scores"].items():
            row |= {name: value[0], f"{name}_of": value[1]} if len(value) == 2 else {name: value[0]}
        rows.append(row)
    frame = pd.DataFrame(rows)
    averaged = {"seconds", *_MEANS}
    how = {
        name: "mean" if name in averaged else "sum" for name in frame.columns if name not in ("cell", "step")
    }
    return frame.groupby(["cell", "step"], sort=False).agg(how).reset_index()


def rate(row: Any, name: str) -> Rate | None:
    """A rate of a row of `pooled`, `None` where its task does not have it."""
    of = row.get(f"{name}_of")
    return None if of is None or not of > 0 else wilson(row[name], of)


def markdown(frame: pd.DataFrame, shown: Iterable[str] = ()) -> str:
    """A Markdown table of pooled rows: what sets each cell apart, then its scores.

    Args:
        frame: rows of `pooled`.
        shown: fields of the cell that have a column; others are named where they are not the default.
    """
    shown = list(shown)
    header = [*shown, "else", "steps", "seeds", *RATES.values(), *_MEANS.values(), "s"]
    body = []
    for _, row in frame.iterrows():
        cell = asdict(row["cell"])
        others = [
            f"{field.name} = {cell[field.name]}"
            for field in fields(Cell)
            if field.name not in (*shown, "seed", "steps") and cell[field.name] != field.default
        ]
        rates = ["-" if (found := rate(row, name)) is None else str(found) for name in RATES]
        means = ["-" if pd.isna(row.get(name)) else f"{row[name]:.3f}" for name in _MEANS]
        body.append(
            [
                *(str(cell[name]) for name in shown),
                ", ".join(others),
                str(row["step"]),
                str(int(row["seeds"])),
                *rates,
                *means,
                f"{row['seconds']:.0f}",
            ]
        )
    used = [i for i, name in enumerate(header) if any(cells[i] not in ("", "-") for cells in body)]
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells[i] for i in used) + " |" for cells in lines)
