"""A comparison as Markdown, JSON and a figure."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safegrad_optim.protection._compare import Answers, Comparison

# Of the JSON file; raised where a field changes or goes.
SCHEMA = 1
_WORDS = {
    "held": "The fine-tuned model has kept the refusals of the base model.",
    "lost": "The fine-tuned model has lost refusals of the base model.",
    "inconclusive": "These requests do not tell whether the refusals of the base model are kept.",
}


def report(
    comparison: Comparison,
    prompts: Sequence[str],
    base: Answers,
    tuned: Answers,
    facts: Mapping[str, Any],
    *,
    redact: bool = False,
) -> dict[str, Any]:
    """Return everything that is known as one mapping that JSON takes.

    `prompts` are the requests and, behind them, look-alikes; redacted, they and the replies to them are given
    by their SHA-256. `facts` are what the caller knows: options, versions, fingerprints.
    """
    before, after = comparison.over_refusal
    rows = [
        {"row": number, "prompt": prompt, "base": old, "tuned": new}
        | {"base_refuses": had, "tuned_refuses": has}
        for number, (prompt, old, new, had, has) in enumerate(
            zip(prompts, base.replies, tuned.replies, base.refuses, tuned.refuses, strict=True)
        )
    ]
    if redact:
        rows = [row | {name: _digest(row[name]) for name in ("prompt", "base", "tuned")} for row in rows]
    return {
        "schema": SCHEMA,
        "verdict": comparison.verdict,
        "at_least": comparison.at_least,
        "refusals_kept": _share(comparison.kept),
        "by_category": {name: _share(share) for name, share in comparison.by_category.items()},
        "over_refusal": {"base": _share(before), "tuned": _share(after)},
        "kl_of_first_token": comparison.kl,
        **facts,
        "rows": rows,
    }


def write(found: Mapping[str, Any], comparison: Comparison, folder: Path) -> list[Path]:
    """Write `report.json`, `report.md` and, where matplotlib is installed, `report.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.json", folder / "report.md"]
    paths[0].write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(f"{markdown(found, comparison)}\n\n{_replies(found)}\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return paths
    shares = {**comparison.by_category, "all": comparison.kept}
    figure = Figure(figsize=(7, 1 + 0.35 * len(shares)), layout="constrained")
    axes = figure.subplots()
    for place, share in enumerate(shares.values()):
        low, high = share.interval
        axes.plot([low, high], [place, place], color="tab:blue")
        axes.plot(share.count / max(share.of, 1), place, "o", color="tab:blue")
    axes.set_yticks(range(len(shares)), [f"{name} ({share.of})" for name, share in shares.items()])
    axes.axvline(comparison.at_least, color="grey", linewidth=0.8)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("refusals kept, with 95 % intervals; line: the share to keep")
    figure.savefig(folder / "report.png", dpi=150)
    return [*paths, folder / "report.png"]


def markdown(found: Mapping[str, Any], comparison: Comparison) -> str:
    """Return the verdict and a table of shares."""
    before, after = comparison.over_refusal
    lines = [
        f"**{found['verdict']}**: {_WORDS[found['verdict']]}",
        "",
        "| | rows (95 % interval) |",
        "|---|---|",
    ]
    lines.append(
        f"| refusals kept, of the base model's (at least {comparison.at_least:.0%}) | {comparison.kept} |"
    )
    lines += [f"| - {name} | {share} |" for name, share in comparison.by_category.items()]
    lines.append(f"| harmless look-alikes refused, base model | {before} |")
    lines.append(f"| harmless look-alikes refused, fine-tuned model | {after} |")
    lines.append(f"| KL(base, tuned) of the first token (nats) | {comparison.kl:.3f} |")
    return "\n".join(lines)


def _replies(found: Mapping[str, Any]) -> str:
    lines = ["| row | prompt | base model | fine-tuned model |", "|---|---|---|---|"]
    for row in found["rows"]:
        cells = (" ".join(str(row[name]).replace("|", "\\|").split()) for name in ("prompt", "base", "tuned"))
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(share: Any) -> dict[str, Any]:
    low, high = share.interval
    return {"count": share.count, "of": share.of, "low": low, "high": high}


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()
