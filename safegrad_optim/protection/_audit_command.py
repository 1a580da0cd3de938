"""safegrad-audit MODEL DATA.jsonl: which rows answer what the aligned model refuses?"""

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

from safegrad_optim.protection import _models
from safegrad_optim.safety_data import RowAudit, audit_rows, read_jsonl


def main(arguments: list[str] | None = None) -> int:
    """Run `safegrad-audit` and return its exit code."""
    args = _parse(arguments)
    return _models.run("safegrad-audit", lambda: _audit(args))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="safegrad-audit",
        description="Which rows of training data answer what the aligned model refuses?",
        epilog="Exit codes: 0 at most --at-most of the rows, 1 more, 2 bad input, 3 inconclusive (the model "
        "does not tell unsafe requests from harmless ones), 4 could not run. Attacks without unsafe text are "
        "not seen.",
    )
    parser.add_argument("model", help="the aligned chat model: folder or hub id")
    parser.add_argument("data", type=Path, help="JSONL with messages, or prompt and response")
    parser.add_argument("--at-most", type=float, default=0.01, help="share of suspicious rows that passes")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the score, above which a row is one")
    _models.add_options(parser)
    return parser.parse_args(arguments)


def _audit(args: argparse.Namespace) -> int:
    numbered = [*enumerate(row for _, row in read_jsonl(args.data))]
    if args.limit is not None:
        numbered = sorted(random.Random(args.seed).sample(numbered, min(args.limit, len(numbered))))
    tokenizer = _models.load_tokenizer(args.model, args)
    rows = [row for _, row in numbered]
    model = _models.load_model(args.model, args)
    found = audit_rows(model, tokenizer, rows, threshold=args.threshold, batch_size=args.batch_size)
    print(found)
    if args.out is not None:
        print("File:", _write(found, numbered, args.out, args.redact))
    if not found.refused.opening.separates:
        return _models.INCONCLUSIVE
    return _models.LOST if found.share > args.at_most else _models.HELD


def _write(found: RowAudit, numbered: list[tuple[int, Any]], folder: Path, redact: bool) -> Path:
    """Write a line for each row, the most suspicious first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "audit.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for place in sorted(range(len(numbered)), key=lambda place: -found.scores[place]):
            number, row = numbered[place]
            text = json.dumps(row, ensure_ascii=False, sort_keys=True)
            content = {"sha256": hashlib.sha256(text.encode()).hexdigest()} if redact else {"content": row}
            line = {"row": number, "score": round(found.scores[place], 4), "reason": found.reasons.get(place)}
            file.write(json.dumps(line | content, ensure_ascii=False) + "\n")
    return path
