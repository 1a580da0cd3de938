"""Which rows of training data answer what the aligned model refuses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from safegrad_optim.batches import IGNORE_INDEX
from safegrad_optim.parallel import inner_module
from safegrad_optim.reference import reference_source
from safegrad_optim.safety_data._messages import messages_of
from safegrad_optim.safety_data._openings import openings
from safegrad_optim.safety_data._refusals import is_refusal
from safegrad_optim.safety_data._refused import RefusedPrompts, refused_prompts
from safegrad_optim.safety_data._shipped import shipped_harmless_prompts, shipped_requests
from safegrad_optim.safety_data._template import prompt_tokens
from safegrad_optim.safety_data._training_prompts import TrainingData

_THRESHOLD = 0.5


@dataclass(frozen=True)
class RowAudit:
    """What `audit_rows` found; printed, a report without any text of the rows."""

    scores: list[float]  #: of each row, that of its prompt which is refused most
    reasons: Mapping[int, str]  #: of each suspicious row, by its number
    false_positives: float  #: share of prompts known to be harmless whose own score is above the threshold
    refused: RefusedPrompts

    @property
    def share(self) -> float:
        """The share of suspicious rows."""
        return len(self.reasons) / len(self.scores)

    def __str__(self) -> str:
        return (
            f"{self.refused}\n{len(self.reasons)} of {len(self.scores)} rows ({self.share:.1%}) answer what "
            f"the aligned model refuses. Of prompts known to be harmless {self.false_positives:.1%} score so."
        )


def audit_rows(
    model: nn.Module,
    tokenizer: Any,
    data: TrainingData,
    *,
    requests: list[dict[str, str]] | None = None,
    threshold: float = _THRESHOLD,
    batch_size: int = 32,
) -> RowAudit:
    """Find the rows of training data whose prompt the aligned model refuses, and whose reply does not.

    score = that of `refused_prompts`; of a conversation the highest of its prompts'

    It sees attacks by requests, whoever wrote them and in any language. It does not see attacks without
    unsafe text, such as harmless instructions obeyed under a new name: no model refuses their prompts.

    Args:
        model: the aligned model; with its PEFT adapters switched off.
        tokenizer: its tokenizer, with a chat template.
        data: rows as `safety_sources` takes them.
        requests: rows with "request" and "lookalike" to calibrate by; by default `shipped_requests()`.
        threshold: of the score, above which a row is suspicious.
        batch_size: prompts that go through the model at a time.

    Raises:
        TypeError: the data can be read only once, or are a mapping of splits.
        ValueError: no rows, or one in which no reply can be told from its prompt.
    """
    known = shipped_requests() if requests is None else requests
    unsafe, harmless = ([row[name] for row in known] for name in ("request", "lookalike"))
    options: dict[str, Any] = {"threshold": threshold, "batch_size": batch_size}
    found = refused_prompts(model, tokenizer, data, unsafe=unsafe, harmless=harmless, **options)
    scores = [0.0] * len(data)
    for prompt, score in zip(found.prompts, found.scores.tolist(), strict=True):
        scores[prompt.row] = max(scores[prompt.row], score)
    reasons = {}
    for row in sorted(found.flagged_rows):
        reply = _last_reply(row, data[row], tokenizer)
        if reply is None or not is_refusal(reply):
            answer = "has no reply" if reply is None else "does not refuse"
            reasons[row] = f"the aligned model refuses its prompt (score {scores[row]:.2f}), the row {answer}"
    innocent = [row["prompt"] for row in shipped_harmless_prompts()]
    innocent += [row["lookalike"] for row in shipped_requests("held_out")]
    tokens = [prompt_tokens("A prompt", text, tokenizer) for text in innocent]
    source, opening = reference_source(inner_module(model)), found.opening
    masses, _ = openings(source, tokens, opening.before, batch_size, opening.mass)
    return RowAudit(scores, reasons, float((masses > threshold).float().mean()), found)


def _last_reply(number: int, row: Any, tokenizer: Any) -> str | None:
    if isinstance(row, Mapping) and "input_ids" in row:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        return str(tokenizer.decode(list(_learnt(pairs)), skip_special_tokens=True))
    last = messages_of(f"Row {number}", row)[-1]
    return str(last["content"]) if last["role"] == "assistant" else None


def _learnt(pairs: Any) -> Iterator[int]:
    return (int(token) for token, label in pairs if int(label) != IGNORE_INDEX)
