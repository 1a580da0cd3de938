"""Rows from the user's own JSONL files, each refused with the file, the line and what to do."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.chat_data import Turn

__all__ = ["BadDataError", "check_responses", "read_jsonl", "split_off"]


class BadDataError(Exception):
    """The data cannot be used; the message says where and why."""


def read_jsonl(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read rows that have the given fields, all non-empty strings.

    Raises:
        BadDataError: the file is missing or empty, or a row is malformed.
    """
    if not path.is_file():
        raise BadDataError(f"{path} is not there. Give the path of a JSONL file.")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise BadDataError(f"{path}:{number} is not JSON ({error}).") from None
            for field in fields:
                value = row.get(field) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value.strip():
                    raise BadDataError(f"{path}:{number} has no text in '{field}'; rows need {list(fields)}.")
            rows.append(row)
    if not rows:
        raise BadDataError(f"{path} has no rows.")
    return rows


def split_off(turns: list[Turn], path: Path, most: int = 120) -> tuple[list[Turn], list[Turn]]:
    """Hold out the last fifth of the rows, at most `most`, for task accuracy.

    Raises:
        BadDataError: there are too few rows to do so.
    """
    held_out = min(len(turns) // 5, most)
    if held_out == 0:
        raise BadDataError(f"{path} has {len(turns)} rows; at least 5 are needed to hold one out.")
    return turns[:-held_out], turns[-held_out:]


def check_responses(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], source: str) -> None:
    """Check that each response is at least one token, so that there is something to learn from.

    Raises:
        BadDataError: a response has no tokens.
    """
    for number, turn in enumerate(turns, start=1):
        if not tokenizer(turn.response, add_special_tokens=False)["input_ids"]:
            raise BadDataError(f"{source}: row {number} has a response without tokens: {turn.response!r}.")
