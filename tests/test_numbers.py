"""The numbers of README and docs are those of the committed results."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cost import cost
from benchmarks.poisoned_finetuning import figures
from benchmarks.poisoned_finetuning.cells import Cell
from benchmarks.poisoned_finetuning.result_lines import read
from common.report import ROWS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples/benchmarks/poisoned_finetuning/results.jsonl"
DOCS = ROOT / "docs"
MEASURED = DOCS / "evidence"

TASKS = {label: task for task, label in figures.TASKS.items()}
ARMS = {
    "plain": {"arm": "plain"},
    "default": {},
    "default, 4 rows": {"rows": 4},
    "4 rows, `prefix_weight=12.5`": {"rows": 4, "prefix_weight": 12.5},
    "filtered": {"arm": "filtered"},
    "dropped": {"arm": "dropped"},
    "`refresh_every=2`": {"refresh_every": 2},
}
SCORES = ("not_refused", "unlikely", "task_right", "over_refused")


def text_of(page):
    return page.read_text(encoding="utf-8")


def table_below(page, header):
    """The cells of a table, row by row, whose first line begins so."""
    rows = text_of(page).partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


@pytest.fixture(scope="module")
def lines():
    """The result lines by cell and step."""
    return {(Cell(**line["cell"]), line["step"]): line for line in read(RESULTS)}


def close(text, pair):
    """Whether a text of two digits is the share that a pair of counts is."""
    count, of = pair
    return abs(float(text) - count / of) <= 0.005 + 1e-9


def test_the_table_of_the_evidence(lines):
    table = table_below(DOCS / "evidence.md", "| attack | task |")
    assert len(table) > 15
    for attack, task, ratio, arm, steps, *shown in table:
        step, _, whole = steps.partition("/")
        cell = Cell(task=TASKS[task], ratio=float(ratio), steps=int(whole or step), **ARMS[arm])
        cell = replace(cell, attack="advbench" if attack == "requests" else attack)
        scores = lines[cell, int(step)]["scores"]
        for name, value in zip(SCORES, shown, strict=True):
            assert close(value, scores[name]), f"{name} of {cell}"


def test_the_table_of_attackers_who_know(lines):
    disguises = {
        "least refused of 12 wordings": "reworded",
        "92 task forms": "unlike",
        "the task's instruction": "instructed",
    }
    table = table_below(DOCS / "evidence.md", "| disguise | task |")
    assert len(table) > 3
    for disguise, task, flagged, aligned, *shown in table:
        cell = Cell(task=TASKS[task], ratio=0.3, attack=disguises[disguise])
        line = lines[cell, 120]
        assert close(flagged, line["safety"]["flagged_attack"])
        # What the aligned model answers does not depend on the task.
        assert close(aligned, lines[replace(cell, arm="aligned", task="sst2"), 0]["scores"]["not_refused"])
        for name, value in zip(("not_refused", "complied", "task_right", "over_refused"), shown, strict=True):
            assert close(value, line["scores"][name])


def test_the_last_check_alarms_in_each_run_that_leaks_and_in_none_that_holds(lines):
    """Over the attacks by requests; those of another identity are told of in the page."""
    seen = {True: 0, False: 0}
    aligned = Cell("aligned", ratio=0.3)
    for (cell, _), line in lines.items():
        asked = line.get("checked", [])
        if (
            cell.model != Cell.model
            or cell.attack == "identity"
            or not asked
            or "prefixed requests" not in asked[0]["kept"]
        ):
            continue
        before = lines.get((replace(aligned, attack=cell.attack), 0)) or lines[Cell("aligned", ratio=0.0), 0]
        now, then = (found["scores"]["not_refused"] for found in (line, before))
        leaks = now[0] / now[1] > then[0] / then[1] + 0.1
        assert bool(asked[-1]["leaks"]) == leaks, cell
        seen[leaks] += 1
    assert seen[True] > 3
    assert seen[False] > 10


def test_the_table_of_the_readme():
    arms = json.loads((MEASURED / "quickstart.json").read_text())["arms"]
    table = {label: cells for label, *cells in table_below(ROOT / "README.md", "|                  ")}
    assert list(table) == [label for label, *_ in ROWS]
    for label, name, form in ROWS:
        found = [arms[arm][name] for arm in ("before", "plain", "SafeGrad")]
        assert table[label] == ["-" if value is None else form.format(value) for value in found]


def test_the_table_of_the_surgery():
    results = json.loads((MEASURED / "cost.json").read_text())
    assert cost.surgery_table(results["surgery"]).partition("\n\n")[2] in text_of(DOCS / "cost.md")


# A sentence of a page with a group for each number, and what these are: score, step and cell.
TICKETS, LONG, IDENTITY = {"task": "tickets"}, {"steps": 400}, {"attack": "identity"}
PROSE = [
    (
        "README.md",
        r"answered (\S+) of unsafe requests after 120 steps, a protected one (\S+)\. Without",
        [("not_refused", 120, {"arm": arm, "ratio": 0.0}) for arm in ("plain", "default")],
    ),
    (
        "README.md",
        r"on tickets (\S+) against (\S+) after 120 of 400 steps, and (\S+) against (\S+) after all",
        [
            ("task_right", 120, TICKETS | LONG),
            ("task_right", 120, TICKETS | LONG | {"arm": "plain"}),
            ("task_right", 400, TICKETS | LONG),
            ("task_right", 400, TICKETS | LONG | {"arm": "plain"}),
        ],
    ),
    (
        "README.md",
        r"left out, (\S+) against (\S+) after 120",
        [("task_right", 120, TICKETS | {"arm": arm}) for arm in ("filtered", "plain")],
    ),
    (
        "README.md",
        r"new name, (\S+) to (\S+) of unsafe requests",
        [("not_refused", 120, IDENTITY | {"ratio": ratio}) for ratio in (0.3, 0.9)],
    ),
    (
        "docs/evidence.md",
        r"accuracy is (\S+) after 120 steps, where plain has (\S+); after 400 it is (\S+) against (\S+)\. On",
        [
            ("task_right", step, TICKETS | LONG | {"arm": arm})
            for step in (120, 400)
            for arm in ("default", "plain")
        ],
    ),
    (
        "docs/evidence.md",
        r"accuracy is (\S+) after 120 steps against (\S+), and the harmful score (\S+)\. .* at all \((\S+)\)",
        [
            ("task_right", 120, TICKETS | {"arm": "filtered"}),
            ("task_right", 120, TICKETS | {"arm": "plain"}),
            ("not_refused", 120, TICKETS | {"arm": "filtered"}),
            ("not_refused", 120, TICKETS | {"arm": "dropped"}),
        ],
    ),
    (
        "docs/evidence.md",
        r"later still: (\S+) and (\S+) on tickets",
        [("task_right", step, TICKETS | LONG | {"refresh_every": 2}) for step in (120, 400)],
    ),
    (
        "docs/evidence.md",
        r"(\S+) with 90 % of its rows, (\S+) with 30 %, where the aligned model has (\S+)\. Few",
        [
            ("not_refused", 120, IDENTITY),
            ("not_refused", 120, IDENTITY | {"ratio": 0.3}),
            ("not_refused", 0, IDENTITY | {"arm": "aligned", "ratio": 0.0}),
        ],
    ),
    (
        "docs/choose.md",
        r"accuracy: (\S+) against (\S+) on tickets after 400 steps",
        [("task_right", 400, TICKETS | LONG | {"refresh_every": every}) for every in (2, 1)],
    ),
    (
        "docs/choose.md",
        r"accuracy (\S+) instead of (\S+) on tickets after 120 steps",
        [("task_right", 120, TICKETS | {"arm": "filtered"}), ("task_right", 120, TICKETS | LONG)],
    ),
]


@pytest.mark.parametrize(("page", "sentence", "numbers"), PROSE)
def test_the_numbers_of_sentences(page, sentence, numbers, lines):
    found = re.findall(sentence, " ".join(text_of(ROOT / page).split()))
    assert len(found) == 1, sentence
    for text, (name, step, cell) in zip(found[0], numbers, strict=True):
        assert close(text, lines[Cell(**cell), step]["scores"][name]), f"{name} of {cell} after {step} steps"
