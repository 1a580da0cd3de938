"""The numbers of README and docs are those of the committed results."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cost import cost
from benchmarks.poisoned_finetuning.cells import Cell
from benchmarks.poisoned_finetuning.result_lines import read
from common.report import ROWS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples/benchmarks/poisoned_finetuning/results.jsonl"
DOCS = ROOT / "docs"
MEASURED = DOCS / "evidence"

TASKS = {"SST-2": "sst2", "tickets": "tickets", "AG News": "agnews"}
ARMS = {
    "plain": {"arm": "plain"},
    "default": {},
    "default, 4 rows": {"rows": 4},
    "4 rows, `prefix_weight=12.5`": {"rows": 4, "prefix_weight": 12.5},
    "`refresh_every=2`": {"refresh_every": 2},
}
SCORES = ("not_refused", "unlikely", "task_right", "over_refused")


def text_of(page):
    return page.read_text(encoding="utf-8")


def table_below(page, header):
    """The cells of a table, row by row, whose first line begins so."""
    rows = text_of(page).partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def key(cell):
    """What a run is told by, whatever its length; plain runs have none of what protects."""
    own = {"rows": 2, "prefix_weight": 5.0} if cell.arm == "plain" else {}
    return replace(cell, steps=0, **own)


@pytest.fixture(scope="module")
def scores():
    """The scores of a run after so many steps, by its cell."""
    return {(key(Cell(**line["cell"])), line["step"]): line["scores"] for line in read(RESULTS)}


def test_the_table_of_the_evidence(scores):
    table = table_below(DOCS / "evidence.md", "| attack | task |")
    assert len(table) > 15
    for attack, task, ratio, arm, steps, *shown in table:
        cell = Cell(task=TASKS[task], ratio=float(ratio), **ARMS[arm])
        cell = replace(cell, attack="advbench" if attack == "requests" else attack)
        found = scores[key(cell), int(steps)]
        for name, value in zip(SCORES, shown, strict=True):
            count, of = found[name]
            assert abs(float(value) - count / of) <= 0.005 + 1e-9, f"{name} of {cell}"


def test_the_table_of_the_readme():
    arms = json.loads((MEASURED / "quickstart.json").read_text())["arms"]
    table = {label: cells for label, *cells in table_below(ROOT / "README.md", "|                  ")}
    assert list(table) == [label for label, *_ in ROWS]
    for label, name, form in ROWS:
        found = [arms[arm][name] for arm in ("before", "plain", "SafeGrad")]
        assert table[label] == ["-" if value is None else form.format(value) for value in found]


def test_the_tables_of_the_cost():
    results = json.loads((MEASURED / "cost.json").read_text())
    page = text_of(DOCS / "cost.md")
    for mode in ("lora", "full"):
        assert cost.training_table(mode, results[mode]).partition("\n\n")[2] in page
    for made in (cost.surgery_table(results["surgery"]),):
        assert made.partition("\n\n")[2] in page


# A sentence of a page, with a group for each number, and what each is: a score, the cell and the step.
TICKETS, SST2 = {"task": "tickets"}, {"task": "sst2"}
PROSE = [
    (
        "README.md",
        r"on tickets (\S+) against (\S+) after 120 steps, and (\S+) after 400",
        [
            ("task_right", TICKETS, 120),
            ("task_right", TICKETS | {"arm": "plain"}, 120),
            ("task_right", TICKETS, 400),
        ],
    ),
]


@pytest.mark.parametrize(("page", "sentence", "numbers"), PROSE)
def test_the_numbers_of_sentences(page, sentence, numbers, scores):
    found = re.findall(sentence, " ".join(text_of(ROOT / page).split()))
    assert len(found) == 1, sentence
    for value, (name, cell, step) in zip(found[0], numbers, strict=True):
        count, of = scores[key(Cell(**cell)), step][name]
        assert abs(float(value) - count / of) <= 0.005 + 1e-9, f"{name} of {cell} after {step} steps"
