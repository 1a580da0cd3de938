"""Rows of a JSONL file, each with the place that an error has to name."""

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any


def read_jsonl(path: str | PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSONL file, each behind its place, "<path>:<line number>"; blank lines count."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. Give the path of a JSONL file.")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}). Give one row a line.") from None
            yield f"{path}:{number}", row
