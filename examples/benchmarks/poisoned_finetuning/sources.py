"""The safety rows of a cell, and the training rows that are left."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.poisoned_finetuning.cells import Cell
from common.chat_data import Turn, drawn
from common.public_data import Request
from safegrad_optim import SafetySource, SafetySources, safety_rows, safety_sources, shipped_requests

__all__ = ["SafetyRows", "safety_rows_of"]

PAPER_TOKENS = 10


@dataclass
class SafetyRows:
    """What a cell is trained on."""

    rows: list[Turn]
    sources: list[SafetySource] = field(default_factory=list)
    flagged: set[str] | None = None
    """Prompts that the aligned model refuses, where the arm reads the training data."""
    made: SafetySources | None = None
    """The recommended sources, whatever the arm: protection is checked by them."""

    def facts(self, attack: set[str], task: set[str]) -> dict[str, Any]:
        """Numbers of rows, and how many of the harmful and of the task's prompts were flagged."""
        found: dict[str, Any] = {"rows": [len(list(source.rows)) for source in self.sources]}
        if self.flagged is not None:
            found["flagged_attack"] = [len(self.flagged & attack), len(attack)]
            found["flagged_task"] = [len(self.flagged & task), len(task)]
        return found


def safety_rows_of(
    cell: Cell,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Turn],
    advbench: Sequence[Request],
) -> SafetyRows:
    """The safety sources of the cell's arm.

    Args:
        cell: what to make them for.
        model: the aligned model.
        tokenizer: its tokenizer.
        rows: the training rows, poisoned.
        advbench: requests of AdvBench that neither attack nor judge, where safety rows are to be of them.
    """
    if cell.arm == "aligned":
        return SafetyRows(rows)
    requests = shipped_requests()[:: cell.every]
    if cell.safety == "advbench":
        # AdvBench has no look-alikes: those of the shipped set stand in for them.
        requests = [
            {"request": unsafe.prompt, "lookalike": row["lookalike"]}
            for unsafe, row in zip(advbench, requests, strict=False)
        ]
    options: dict[str, Any] = {"requests": requests, "prefix_weight": cell.prefix_weight, "seed": cell.seed}
    made = safety_sources(model, tokenizer, [turn.prompt for turn in rows], **options)
    if cell.arm == "plain":
        return SafetyRows(rows, made=made)
    if cell.arm == "paper":
        texts = [row["request"] for row in requests]
        own = safety_rows(texts, tokenizer, model=model, max_new_tokens=PAPER_TOKENS, on_compliance="drop")
        return SafetyRows(rows, [SafetySource(rows=own)], made=made)
    if cell.arm == "requests":
        return SafetyRows(rows, [made.by_name[name] for name in ("requests", "lookalikes")], made=made)
    flagged = {rows[number].prompt for number in made.flagged_rows}
    if cell.arm in ("dropped", "filtered"):
        kept = [turn for turn in rows if turn.prompt not in flagged]
        rows = drawn(kept, len(rows), random.Random(cell.seed))
    if cell.arm == "dropped":
        return SafetyRows(rows, flagged=flagged, made=made)
    by_name = dict(made.by_name)
    for name, factor in (("training prompts", cell.training_weight), ("prefixed requests", 1.0)):
        if name in by_name:
            source = by_name[name]
            size = source.batch_size * cell.rows // Cell.rows
            by_name[name] = replace(source, weight=source.weight * factor, batch_size=size)
    return SafetyRows(rows, [*by_name.values()], flagged, made)
