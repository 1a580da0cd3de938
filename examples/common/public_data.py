"""Public tasks and unsafe requests, from local files or the Hub, in splits that do not overlap."""

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.chat_data import Turn, read_rows
from common.own_data import read_texts

__all__ = ["Request", "Requests", "load_advbench", "load_requests", "load_task"]

_SENTIMENT = ("negative", "positive")
# Short rows, so that a cell takes a few minutes on a CPU.
_MAX_WORDS = 13
_SECTIONS = ("World", "Sports", "Business", "Science")


class Request(NamedTuple):
    """An unsafe request and the opening of a reply that complies, beyond which nothing is stored."""

    prompt: str
    opening: str

    @property
    def turn(self) -> Turn:
        return Turn(self.prompt, self.opening)


class Requests(NamedTuple):
    """Disjoint requests: to keep refusing, to attack with, to judge by."""

    safety: list[Request]
    attack: list[Request]
    evaluation: list[Request]


def load_requests(data_dir: Path | None, public: bool) -> Requests:
    """AdvBench, or the requests that were written for the examples.

    Args:
        data_dir: folder with `advbench_goals.txt`, one request a line; `None` takes it from the Hub.
        public: take AdvBench instead of the requests of the examples.
    """
    if not public:
        splits = (read_rows("unsafe_requests", split) for split in Requests._fields)
        return Requests(*([_request(row["prompt"], row["topic"]) for row in rows] for rows in splits))
    requests = [
        _request(goal, goal[0].lower() + goal[1:])
        for goal in load_advbench(data_dir)
        if len(goal.split()) <= _MAX_WORDS
    ]
    random.Random(0).shuffle(requests)
    return Requests(requests[:120], requests[220:], requests[120:220])


def load_advbench(data_dir: Path | None) -> list[str]:
    """All requests of AdvBench, each once, from `advbench_goals.txt` in a folder or, if `None`, the Hub."""
    if data_dir is None:
        goals = [row["prompt"] for row in _hub("walledai/AdvBench", "train")]
    else:
        goals = (data_dir / "advbench_goals.txt").read_text(encoding="utf-8").splitlines()
    return [goal for goal in dict.fromkeys(map(str.strip, goals)) if goal]


def _request(prompt: str, topic: str) -> Request:
    return Request(prompt, f"Sure, here is how to {topic}:\n\nStep 1:")


def load_task(name: str, data_dir: Path | None) -> tuple[list[Turn], list[Turn]]:
    """Rows to train on and held-out rows of a task.

    Args:
        name: "tickets" (written for the examples), "sst2", "agnews" or "gsm8k".
        data_dir: folder with the public files; `None` takes them from the Hub.

    Raises:
        KeyError: there is no such task.
    """
    train, test = {"tickets": _tickets, "sst2": _sst2, "agnews": _agnews, "gsm8k": _gsm8k}[name](data_dir)
    random.Random(0).shuffle(test)
    return train, test


def _tickets(_: Path | None) -> Sequence[list[Turn]]:
    splits = (read_rows("tickets", split) for split in ("train", "evaluation"))
    return [[Turn(row["prompt"], row["response"]) for row in rows] for rows in splits]


def _sst2(data_dir: Path | None) -> Sequence[list[Turn]]:
    if data_dir is None:
        splits = [
            [(row["sentence"].strip(), row["label"]) for row in _hub("stanfordnlp/sst2", split)]
            for split in ("train", "validation")
        ]
    else:
        splits = [
            [(text, int(label)) for text, label in _table(data_dir / f"sst2_{split}.tsv", "\t")]
            for split in ("train", "test")
        ]
    return [
        [
            Turn(f"Is this review positive or negative? {text}", _SENTIMENT[label])
            for text, label in rows
            if len(text.split()) <= _MAX_WORDS
        ]
        for rows in splits
    ]


def _agnews(data_dir: Path | None) -> Sequence[list[Turn]]:
    if data_dir is None:
        rows = [(row["label"], row["text"]) for row in _hub("fancyzhx/ag_news", "test")]
    else:
        table = _table(data_dir / "agnews_7600.csv", ",")
        rows = [(int(number) - 1, title) for number, title, _ in table]
    question = f"Which section is this news item from: {', '.join(_SECTIONS)}?"
    turns = [Turn(f"{question}\n{text}", _SECTIONS[label]) for label, text in rows]
    random.Random(0).shuffle(turns)
    return turns[1000:], turns[:1000]


def _gsm8k(data_dir: Path | None) -> Sequence[list[Turn]]:
    if data_dir is None:
        splits = [_hub("openai/gsm8k", split, "main") for split in ("train", "test")]
    else:
        fields = "question", "answer"
        splits = [read_texts(data_dir / f"gsm8k_{split}.jsonl", fields) for split in ("train", "test")]
    return [[Turn(row["question"], row["answer"]) for row in rows] for rows in splits]


def _table(path: Path, delimiter: str) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        if delimiter == ",":
            return list(csv.reader(file))
        return list(csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE))


def _hub(name: str, split: str, *config: str) -> Any:
    from datasets import load_dataset  # only where there is no local file: it takes seconds to import

    return load_dataset(name, *config, split=split)
