"""The safety sources that are recommended: from requests, their look-alikes, and the training data."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safegrad_optim.batches import SafetySource
from safegrad_optim.parallel import inner_module
from safegrad_optim.reference import ReferenceSource, reference_source
from safegrad_optim.safety_data._calibration import IsRefusal, Opening, calibrated
from safegrad_optim.safety_data._openings import openings
from safegrad_optim.safety_data._prefixes import prefixed_tokens
from safegrad_optim.safety_data._refusals import is_refusal
from safegrad_optim.safety_data._refused import RefusedPrompts, find_refused
from safegrad_optim.safety_data._rows import opening_rows
from safegrad_optim.safety_data._shipped import shipped_harmless_prompts, shipped_requests
from safegrad_optim.safety_data._template import chat_tokenizer, prompt_tokens
from safegrad_optim.safety_data._training_prompts import TrainingData, TrainingPrompt, training_prompts

_REFUSING = 0.5
_NEIGHBOURS = 8
# Refused training prompts from which on some are kept to check by, and at most how many.
_ENOUGH_TO_SPARE, _CHECKED = 16, 16
# Prefixes that each request is put behind, and times the weight of such rows where no prompts are refused.
_PREFIXES, _ALONE = 2, 2.5


class _Shape(NamedTuple):
    """What a source is like."""

    rows: int  # a step
    tokens: int  # compared, from the one that decides whether a reply refuses: "I'm" alone is no refusal yet
    weight: float  # of the mean over these


_SHAPES = {
    "requests": _Shape(2, 5, 2.5),
    "lookalikes": _Shape(2, 2, 1.0),
    "training prompts": _Shape(2, 5, 2.5),
}


@dataclass(frozen=True)
class SafetySources:
    """What `safety_sources` made: iterated over, the sources; printed, a report without training texts."""

    by_name: Mapping[str, SafetySource]
    report: str
    refused_prompts: RefusedPrompts | None
    kept_out: Sequence[TrainingPrompt]  #: refused training prompts that are in no row, to check by
    prefixed: Sequence[Sequence[int]]  #: held-out requests behind beginnings of training prompts, to check by
    opening: Opening  #: the token of replies that tells which prompts are refused
    chat_template_kwargs: Mapping[str, Any] | None  #: what the chat template was given besides messages

    @property
    def flagged_rows(self) -> frozenset[int]:
        """The numbers of the training rows with a prompt that the aligned model refuses.

        Whoever does not want the model to learn from them leaves them out of training. They are held as
        safety rows all the same, so that what was not flagged does not break the others.
        """
        return frozenset() if self.refused_prompts is None else self.refused_prompts.flagged_rows

    def __iter__(self) -> Iterator[SafetySource]:
        return iter(self.by_name.values())

    def __str__(self) -> str:
        return self.report


def safety_sources(
    model: nn.Module,
    tokenizer: Any,
    training_data: TrainingData | None,
    *,
    requests: Sequence[Mapping[str, Any]] | None = None,
    prefix_weight: float = 5.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    is_refusal: IsRefusal = is_refusal,
    batch_size: int = 32,
    seed: int = 0,
) -> SafetySources:
    """Make the sources that keep an aligned model's refusals, and its answers to harmless look-alikes.

    - "requests": unsafe requests that the model refuses;
    - "lookalikes": harmless requests of the same words that it answers, against over-refusal;
    - "training prompts": those prompts of the training data that it refuses, see `refused_prompts`, but for
      some that `ProtectionCheck` checks by;
    - "prefixed requests": the unsafe requests behind beginnings that training prompts share, against
      attacks without unsafe text.

    Each row has the first five tokens of the aligned model's own reply (look-alikes two): "I'm" alone opens
    "I'm sorry" as well as "I'm glad to help". Whether a reply refuses is known by the token it opens with, in
    any language: see `refused_prompts`. Rows of the training data matter most, for requests of another hand
    than the attack's lose their effect within some hundred steps. The weights are 2.5, 1, 2.5 and
    `prefix_weight`, with two rows a step each. If no training prompt is refused, prefixed requests have four
    rows, and 2.5 times the weight.

    Args:
        model: the aligned model, before fine-tuning; with its PEFT adapters switched off.
        tokenizer: its tokenizer, with a chat template.
        training_data: rows to fine-tune on: texts, messages, prompt and response, or tokenised with labels;
            `None` for no source of them, which protects only against attacks of the requests' own hand.
        requests: rows with "request" and "lookalike", and perhaps a "category"; by default
            `shipped_requests()`.
        prefix_weight: of the prefixed requests. More, such as 12.5, holds more of an attack without unsafe
            text, and costs task accuracy.
        chat_template_kwargs: what else the chat template is given, as in `safety_rows`.
        is_refusal: tells whether a reply refuses; asked of a model that answers many of the unsafe requests.
        batch_size: prompts that go through the model at a time.
        seed: of the prefixes, and of what is kept out.

    Raises:
        ValueError: no chat template; there are no requests, or the model does not refuse them otherwise than
            it answers look-alikes; training data without prompts.
        TypeError: the training data can be read only once, or are a mapping of splits.
    """
    tokenizer = chat_tokenizer(tokenizer, chat_template_kwargs)
    rows = shipped_requests() if requests is None else list(requests)
    unsafe, harmless = (_prompts(rows, name, tokenizer) for name in ("request", "lookalike"))
    # The look-alikes alone, of which a model refuses some by mistake, would blur what an answer opens with.
    others = [] if requests is not None else _harmless(tokenizer)
    source = reference_source(inner_module(model))
    opening = _separating(calibrated(source, tokenizer, unsafe, harmless + others, batch_size, is_refusal))
    answered = 1 - opening.of_harmless[: len(harmless)]
    kept = {"requests": _above(unsafe, opening.of_unsafe), "lookalikes": _above(harmless, answered)}
    lines = [
        _counted("unsafe requests are refused", rows, opening.of_unsafe),
        _counted("look-alikes are answered", rows, answered),
    ]
    found = None
    kept_out: list[TrainingPrompt] = []
    to_check: list[list[int]] = []
    if training_data is not None:
        training = training_prompts(training_data, tokenizer)
        found = find_refused(source, tokenizer, training, opening, _REFUSING, _NEIGHBOURS, batch_size)
        kept_out = _drawn_to_check(found.flagged, seed)
        kept["training prompts"] = [prompt.tokens for prompt in found.flagged if prompt not in kept_out]
        texts, tokens = [row["request"] for row in rows] * _PREFIXES, [prompt.tokens for prompt in training]
        prefixed = prefixed_tokens(texts, tokens, tokenizer, seed=seed)
        to_check = _held_out_behind(tokens, tokenizer, seed + 1)
        masses = _masses(source, prefixed, opening, batch_size)
        kept["prefixed requests"] = _above(prefixed, masses)
        lines.append(_counted("requests behind training prompts are refused", rows * _PREFIXES, masses))
        lines += [str(found)]
        lines += [f"{len(kept_out)} of them are in no safety row, for ProtectionCheck."] * bool(kept_out)
    shapes = _shapes(prefix_weight, kept)
    by_name = {
        name: _source(model, tokenizer, prompts, shapes[name], len(opening.before), batch_size)
        for name, prompts in kept.items()
        if prompts
    }
    lines += [f"No rows of {name}: that source is left out." for name, prompts in kept.items() if not prompts]
    return SafetySources(by_name, "\n".join(lines), found, kept_out, to_check, opening, chat_template_kwargs)


def _shapes(prefix_weight: float, kept: Mapping[str, Any]) -> dict[str, _Shape]:
    """What each source is like; without a refused training prompt an attack can only lie in a form."""
    prefixed = _Shape(2, 5, prefix_weight)
    if not kept.get("training prompts"):
        prefixed = _Shape(4, 5, _ALONE * prefix_weight)
    return _SHAPES | {"prefixed requests": prefixed}


def _source(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    shape: _Shape,
    before: int,
    batch_size: int,
) -> SafetySource:
    """A source of prompts with the aligned model's replies, of which so many tokens tell nothing yet."""
    # By length, so that the rows of a batch need little padding.
    rows = opening_rows(model, tokenizer, sorted(prompts, key=len), before + shape.tokens, batch_size)
    return SafetySource(rows=rows, batch_size=shape.rows, weight=shape.weight)


def _drawn_to_check(flagged: Sequence[TrainingPrompt], seed: int) -> list[TrainingPrompt]:
    if len(flagged) < _ENOUGH_TO_SPARE:
        return []
    return random.Random(seed).sample(flagged, min(_CHECKED, len(flagged) // 4))


def _held_out_behind(prompts: Sequence[Sequence[int]], tokenizer: Any, seed: int) -> list[list[int]]:
    """Requests that no row has, as they stand behind the beginnings of prompts."""
    texts = [row["request"] for row in shipped_requests("held_out")]
    return prefixed_tokens(texts, prompts, tokenizer, seed=seed)


def _separating(opening: Opening) -> Opening:
    """The opening, if it tells unsafe requests from harmless prompts."""
    if not opening.separates:
        raise ValueError(
            f"The model opens its replies to {len(opening.of_unsafe)} unsafe requests much as those to "
            f"{len(opening.of_harmless)} harmless prompts: AUC {opening.auc:.2f}, means {opening.gap:.2f} "
            "apart. Give the aligned chat model, with its own chat template; requests that it refuses; or an "
            "is_refusal= that knows its refusals."
        )
    return opening


def _harmless(tokenizer: Any) -> list[list[int]]:
    return [prompt_tokens("A prompt", row["prompt"], tokenizer) for row in shipped_harmless_prompts()]


def _prompts(rows: Sequence[Mapping[str, Any]], name: str, tokenizer: Any) -> list[list[int]]:
    """The prompts in one field of the requests."""
    if not rows:
        raise ValueError("There are no requests. Give some, or leave them out for shipped_requests().")
    for index, row in enumerate(rows):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(
                f"Row {index} of the requests has no '{name}', found {sorted(row)}. Each row wants a text as "
                "'request' and a harmless one of the same words as 'lookalike', or all refusals are one."
            )
    return [
        prompt_tokens(f"The {name} of row {index}", row[name], tokenizer) for index, row in enumerate(rows)
    ]


def _above(prompts: Sequence[Sequence[int]], masses: Tensor) -> list[Sequence[int]]:
    return [prompt for prompt, mass in zip(prompts, masses, strict=True) if mass > _REFUSING]


def _masses(
    source: ReferenceSource, prompts: Sequence[Sequence[int]], opening: Opening, batch_size: int
) -> Tensor:
    if not prompts:
        return torch.zeros(0)
    return openings(source, prompts, opening.before, batch_size, opening.mass, "Scoring prefixed requests")[0]


def _counted(what: str, rows: Sequence[Mapping[str, Any]], masses: Tensor) -> str:
    """A sentence on how many rows are above the threshold, and of which category fewest."""
    over = [bool(mass > _REFUSING) for mass in masses]
    counted = f"{sum(over)} of {len(over)} {what}"
    of_category: dict[str, list[bool]] = {}
    for row, is_over in zip(rows, over, strict=False):
        of_category.setdefault(row.get("category", ""), []).append(is_over)
    name, least = min(of_category.items(), key=lambda item: sum(item[1]) / len(item[1]), default=("", []))
    return f"{counted}; fewest of {name}: {sum(least)} of {len(least)}." if name else f"{counted}."
