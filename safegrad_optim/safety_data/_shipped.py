"""The safety set in this package: unsafe requests, each with a harmless look-alike, and harmless prompts."""

from pathlib import Path

from safegrad_optim.safety_data._jsonl import read_jsonl

_FOLDER = Path(__file__).with_name("shipped")


def shipped_requests(split: str = "train", language: str = "en") -> list[dict[str, str]]:
    """Return unsafe requests of the safety set, each beside a harmless look-alike of the same words.

    No row has a reply: an aligned model's own are what a safety batch wants. The splits share no topic, so
    keep "held_out" to judge by. What the set is for, and is not, is in `shipped/README.md` beside this file.

    Args:
        split: "train" or "held_out".
        language: "en", or of "train" also "es", "de", "fr" or "zh".

    Returns:
        Rows with `request`, `lookalike`, `topic`, `category`, `form`, `language` and `split`.

    Raises:
        ValueError: there are no such rows.
    """
    rows = _rows("requests")
    found = [row for row in rows if row["split"] == split and row["language"] == language]
    if not found:
        known = sorted({(row["split"], row["language"]) for row in rows})
        raise ValueError(f"No requests of split {split!r} in {language!r}. There are {known}.")
    return found


def shipped_harmless_prompts() -> list[dict[str, str]]:
    """Return the harmless prompts of the safety set, rows with `prompt` and `form`, its kind of task."""
    return _rows("harmless_prompts")


def _rows(name: str) -> list[dict[str, str]]:
    return [row for _, row in read_jsonl(_FOLDER / f"{name}.jsonl")]
