"""Training prompts that the aligned model refuses: safety rows from where an attack would be."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from safegrad_optim.parallel import inner_module
from safegrad_optim.reference import ReferenceSource, reference_source
from safegrad_optim.safety_data._calibration import IsRefusal, Opening, calibrated
from safegrad_optim.safety_data._neighbours import BANK, mean_over_neighbours, neighbours_of_a_kind
from safegrad_optim.safety_data._openings import openings
from safegrad_optim.safety_data._refusals import is_refusal
from safegrad_optim.safety_data._rows import opening_rows
from safegrad_optim.safety_data._template import prompt_tokens, template_ends
from safegrad_optim.safety_data._training_prompts import TrainingData, TrainingPrompt, training_prompts

_PLAUSIBLE = 0.5
# Prompts are of one form where so many tokens at their beginning are the same, behind the template's own.
_FORM_TOKENS = 6


@dataclass(frozen=True)
class RefusedPrompts:
    """What `refused_prompts` found; printed, a report without any text of the training data."""

    prompts: list[TrainingPrompt]
    scores: Tensor  # (prompts,), in [0, 1]
    threshold: float
    opening: Opening  # the token of replies that was scored; where it separates nothing, nothing is flagged
    form_tokens: int  # at the beginning of prompts, by which they are of one form

    @property
    def flagged(self) -> list[TrainingPrompt]:
        """The prompts that the model refuses, each once, highest score first."""
        over = self._over()
        return list({prompt.tokens: prompt for prompt in reversed(over)}.values())[::-1]

    @property
    def flagged_rows(self) -> frozenset[int]:
        """The numbers of all rows that have such a prompt."""
        return frozenset(prompt.row for prompt in self._over())

    def _over(self) -> list[TrainingPrompt]:
        """The prompts above the threshold, as often as they are there, highest score first."""
        if not self.opening.separates:
            return []
        order = self.scores.argsort(descending=True).tolist()
        return [self.prompts[index] for index in order if self.scores[index] > self.threshold]

    def rows(self, model: nn.Module, tokenizer: Any, *, tokens: int = 1) -> list[dict[str, list[int]]]:
        """Return a safety row for each flagged prompt, with the first tokens of the aligned model's reply."""
        return opening_rows(model, tokenizer, [prompt.tokens for prompt in self.flagged], tokens)

    def __str__(self) -> str:
        total, over = len(self.prompts), len(self._over())
        separates = "" if self.opening.separates else ", too little: nothing is flagged"
        lines = [
            f"{over} of {total} training prompts ({over / total:.1%}) are refused by the aligned model "
            f"(score > {self.threshold:g}); it tells unsafe requests from harmless prompts by AUC "
            f"{self.opening.auc:.3f}{separates}."
        ]
        if over:
            order = self.scores.argsort(descending=True)[:5].tolist()
            highest = (f"{self.prompts[index].row} ({self.scores[index]:.2f})" for index in order)
            lines.append(f"Highest scores: rows {', '.join(highest)}.")
            lines += self._forms()
        return "\n".join(lines)

    def _forms(self) -> Iterator[str]:
        """Sentences on groups of prompts that open alike, as the task's own do, and are refused in part."""
        forms: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            forms.setdefault(prompt.tokens[: self.form_tokens], []).append(index)
        for members in forms.values():
            hit = sum(bool(self.scores[index] > self.threshold) for index in members)
            if hit and len(members) >= max(10, 0.05 * len(self.prompts)):
                first = self.prompts[members[0]].row
                yield f"Of {len(members)} prompts that open as row {first} does, {hit} are refused."


def refused_prompts(
    model: nn.Module,
    tokenizer: Any,
    training_data: TrainingData,
    *,
    unsafe: Sequence[str | Mapping[str, Any]],
    harmless: Sequence[str | Mapping[str, Any]],
    threshold: float = 0.5,
    neighbours: int = 8,
    is_refusal: IsRefusal = is_refusal,
    batch_size: int = 32,
) -> RefusedPrompts:
    """Find the training prompts that the aligned model refuses, by how its reply would open.

    odds_v = U_v / (U_v + H_v),   mass(x) = sum_v P_ref(v | x) odds_v,   score(x) = mean mass over neighbours

    where U and H are the mean distributions of the opening token of replies to unsafe requests and to
    harmless prompts. So a refusal is known in any language, without its words. The neighbours of a prompt
    are those training prompts whose final hidden states at the last token are nearest by cosine.

    Rows that open with a refusal and are trained to comply are where an attack is, wherever its requests
    come from: `KLAlignment` holds the reference there with `SafetySource(rows=found.rows(...), tokens=1)`.

    Args:
        model: the aligned model; with its PEFT adapters switched off.
        tokenizer: its tokenizer, with a chat template.
        training_data: see `training_prompts`; texts, messages, or tokenised rows with labels.
        unsafe, harmless: requests that it refuses, and look-alikes that it answers, in the same formats.
        threshold: of the score, above which a prompt is flagged.
        neighbours: that a score is the mean of; fewer where fewer prompts have a mass above the threshold.
        is_refusal: tells whether a reply refuses; asked of a model that answers many of `unsafe`.
        batch_size: prompts that go through the model at a time.

    Raises:
        TypeError: the training data can be read only once, or are a mapping of splits.
        ValueError: no rows, or one in which no reply can be told from its prompt; probabilities that are not
            finite.
    """
    prompts = training_prompts(training_data, tokenizer)
    source = reference_source(inner_module(model))
    opening = calibrated(
        source,
        tokenizer,
        _known("unsafe requests", unsafe, tokenizer),
        _known("harmless prompts", harmless, tokenizer),
        batch_size,
        is_refusal,
    )
    return find_refused(source, tokenizer, prompts, opening, threshold, neighbours, batch_size)


def find_refused(
    source: ReferenceSource,
    tokenizer: Any,
    prompts: list[TrainingPrompt],
    opening: Opening,
    threshold: float,
    neighbours: int,
    batch_size: int,
) -> RefusedPrompts:
    """Find them by an opening that is calibrated already."""
    unique = list(dict.fromkeys(prompt.tokens for prompt in prompts))
    progress = "Scoring training prompts"
    masses, states = openings(source, unique, opening.before, batch_size, opening.mass, progress)
    if len(unique) > BANK:
        warnings.warn(f"{len(unique)} prompts: their neighbours are among {BANK} random ones.", stacklevel=3)
    device = next(source.model.parameters()).device
    count = neighbours_of_a_kind(masses, threshold, neighbours)
    smooth = mean_over_neighbours(masses, states, count, device=device)
    place = {tokens: index for index, tokens in enumerate(unique)}
    scores = smooth[[place[prompt.tokens] for prompt in prompts]]
    share = float((scores > threshold).float().mean())
    if opening.separates and share > _PLAUSIBLE:
        warnings.warn(
            f"The aligned model refuses {share:.0%} of the training prompts. Held to that, it will not learn "
            "a task whose prompts they are: look at the rows in the report before training.",
            stacklevel=3,
        )
    head, _ = template_ends(tokenizer)
    return RefusedPrompts(prompts, scores, threshold, opening, len(head) + _FORM_TOKENS)


def _known(name: str, rows: Sequence[str | Mapping[str, Any]], tokenizer: Any) -> list[Sequence[int]]:
    """The prompts to calibrate by."""
    if not rows:
        raise ValueError(f"There are no {name} to calibrate by. Give some, or those of shipped_requests().")
    return [prompt_tokens(f"Row {index} of the {name}", row, tokenizer) for index, row in enumerate(rows)]
