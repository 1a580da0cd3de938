"""The options of the quickstart, each refused where it is read."""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common.own_data import BadDataError

__all__ = ["parse", "told"]


def parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="hub id or path of an aligned chat model instead of SmolLM2")
    parser.add_argument("--user-data", type=Path, help="JSONL with prompt, response: the user task")
    parser.add_argument("--safety-data", type=Path, help="JSONL with request, lookalike: refusals to keep")
    parser.add_argument("--eval-data", type=Path, help="JSONL with prompt: held-out unsafe requests")
    parser.add_argument("--harmful-ratio", type=share, default=0.3, help="share of harmful rows")
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--lr", type=not_negative, default=3e-4)
    parser.add_argument("--rho", type=not_negative, default=1.0, help="weight of the alignment gradient")
    parser.add_argument("--prefix-weight", type=not_negative, default=5.0, help="of prefixed requests")
    parser.add_argument("--refresh-every", type=positive, default=1, help="steps per alignment gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--limit", type=positive, help="rows to judge by, of each kind")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args(arguments)
    args.started = time.perf_counter()
    # What transformers and peft will rename is for their callers to know, not for readers of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    return args


@contextmanager
def told(program: str) -> Iterator[None]:
    """End with one line and exit code 2 where what the user gave cannot be used."""
    try:
        yield
    except (BadDataError, OSError, RuntimeError, ValueError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return value


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as error:  # torch asserts that it was built for the device
        raise argparse.ArgumentTypeError(f"{text} is not a device here: {error}") from None
    return text


def share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
