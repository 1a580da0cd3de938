"""Every block of Python in README and docs runs, on a tiny model; all names and messages have an entry."""

import ast
import copy
import importlib
import json
import re
import sys
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
import transformers

import safegrad_optim
from safegrad_optim import KLAlignment, SafeGradOptimizer, safety_rows, safety_sources
from safegrad_optim.integrations import transformers as transformers_integration
from safegrad_optim.protection import _check
from safegrad_optim.safety_data import _sources
from tests.support.attacked import ATTACK, HELD_OUT, NO, PAIRS, TASK, UNSAFE, YES, aligned_model, turns
from tests.support.chat import TOKENIZER
from tests.support.models import padded

ROOT = Path(__file__).parent.parent
# Written when the site is built.
GENERATED = {"messages.md"}
DOCS = [
    page
    for page in (ROOT / "docs").rglob("*.md")
    if page.name not in GENERATED and "_build" not in page.parts
]
PAGES = sorted([ROOT / "README.md", *DOCS])
BLOCK = re.compile(r"(?P<mark><!-- not run: [^>]+ -->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def aligned():
    return aligned_model()


def given(aligned, folder):
    """What the pages take for granted, and a user has."""
    model = copy.deepcopy(aligned).train()
    rows = turns(TASK + ATTACK, YES)
    tokenised = safety_rows(rows, TOKENIZER)
    for name in ("safety", "refusals"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns(UNSAFE, NO)))
    sources = safety_sources(model, TOKENIZER, rows)
    args = transformers.TrainingArguments(
        str(folder), max_steps=2, max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True
    )
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = [padded(tokenised[start : start + 8]) for start in (0, 8)]
    return {
        **{name: getattr(safegrad_optim, name) for name in safegrad_optim.__all__},
        "AdamW": torch.optim.AdamW,
        "Trainer": transformers.Trainer,
        "accelerator": accelerate.Accelerator(cpu=True),
        "args": args,
        "check": None,
        "dataset": datasets.Dataset.from_dict(
            {name: value.tolist() for name, value in padded(tokenised).items()}
        ),
        "batch": loader[0],
        "loader": loader,
        "model": model,
        "optimizer": SafeGradOptimizer(base, KLAlignment(model, sources)),
        "requests": UNSAFE,
        "rows": rows,
        "safety": safety_rows("safety.jsonl", TOKENIZER),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(base),
        "sources": sources,
        "step": 5,
        "tokenizer": TOKENIZER,
        "train_dataset": rows,
        "training_data": rows,
        "user_grads": [torch.tensor([-1.0, 3.0])],
        "alignment_grads": [torch.tensor([1.0, 0.0])],
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("ignore::UserWarning")  # of leaks: the page's check may see one in so few steps
def test_every_block_of_python_runs(page, aligned, tmp_path, monkeypatch):
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    assert len(blocks) == page.read_text(encoding="utf-8").count("```python")
    if all(block["mark"] for block in blocks):
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        _sources, "shipped_requests", lambda split="train": PAIRS if split == "train" else HELD_OUT
    )
    monkeypatch.setattr(_sources, "shipped_harmless_prompts", list)
    monkeypatch.setattr(_check, "shipped_requests", lambda split: HELD_OUT)
    names = given(aligned, tmp_path)
    for block in blocks:
        if not block["mark"]:
            exec(compile(block["code"], page.name, "exec"), names)


def test_every_public_name_has_an_entry_and_below_it_an_example():
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = []
    for below in re.split(r"```{eval-rst}\n", reference)[1:]:
        named = re.findall(r"auto(?:class|function|exception):: (\w+)", below)
        example = re.search(r"```python\n(.*?)```", below, re.DOTALL)
        assert [name for name in named if not re.search(rf"\b{name}\b", example[1])] == []
        entries += named
    of_the_trainer = set(transformers_integration.__all__) - {"SafeGradFactory"}
    assert sorted(entries) == sorted({*safegrad_optim.__all__, *of_the_trainer})


def test_every_message_that_is_raised_is_listed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs")
    sys.modules.pop("messages", None)
    messages = importlib.import_module("messages")
    found = list(messages.messages())
    raised = [
        node
        for path in (ROOT / "safegrad_optim").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    ]
    assert len(found) == len(raised) > 100
    # Each tells in words, and not by a variable alone, what is wrong.
    assert [
        message for message in found if not re.search(r"[a-z]{2}", re.sub(r"{[^}]*}", "", message.text))
    ] == []
    messages.write(tmp_path / "messages.md")
    page = (tmp_path / "messages.md").read_text(encoding="utf-8")
    assert all(message.text in page for message in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_inside_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or path in GENERATED:
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{target} in {page.name}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [
                re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
            ]
            assert anchor in slugs, f"{target} in {page.name}"
