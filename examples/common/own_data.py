"""Rows from the user's own JSONL files, each refused with the file, the line and what to do."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.chat_data import Turn
from safegrad_optim.safety_data import read_jsonl

__all__ = ["BadDataError", "check_responses", "read_texts", "split_off"]


class BadDataError(Exception):
    """The data cannot be used; the message says where and why."""


def read_texts(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read rows that have the given fields, all non-empty strings.

    Raises:
        BadDataError: the file is missing or empty, or a row is malformed.
    """
    rows = []
    try:
        for place, row in read_jsonl(path):
            for field in fields:
                value = row.get(field) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value.strip():
                    raise BadDataError(f"{place} has no text in '{field}'; rows need {list(fields)}.")
            rows.append(row)
    except (FileNotFoundError, ValueError) as error:
        raise BadDataError(str(error)) from None
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
