"""Judgements as JSON lines: appended whole, and a line cut short by a kill is taken away."""

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.poisoned_finetuning.cells import Cell

__all__ = ["append", "done", "read"]


def append(path: Path, line: dict[str, Any]) -> None:
    """Write one line to the end of the file and to the disk, in one call, so that writers do not mix."""
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, none if it is not there; the first of those that two processes made at a time.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:  # killed while writing
        os.truncate(path, len(text.encode()) - len(rest.encode()))
    lines: dict[tuple[Cell, int], dict[str, Any]] = {}
    for number, line in enumerate(whole.split("\n") if whole else [], start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}). Mend or remove it.") from None
        lines.setdefault((Cell(**found["cell"]), found["step"]), found)
    return list(lines.values())


def done(path: Path) -> dict[Cell, int]:
    """The last step after which each cell was judged."""
    found: dict[Cell, int] = {}
    for line in read(path):
        cell = Cell(**line["cell"])
        found[cell] = max(line["step"], found.get(cell, 0))
    return found
