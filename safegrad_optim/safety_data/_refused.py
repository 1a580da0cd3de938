"""Training prompts that the aligned model refuses: safety rows from where an attack would be."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safegrad_optim.forward import forward_at, unchanged_evaluation
from safegrad_optim.parallel import inner_module, of_all_ranks, share_of, synchronized
from safegrad_optim.reference import ReferenceSource, reference_source
from safegrad_optim.safety_data._neighbours import BANK, mean_over_neighbours
from safegrad_optim.safety_data._replies import greedy_tokens, shown
from safegrad_optim.safety_data._rows import chat_tokens, labelled, messages_of
from safegrad_optim.safety_data._training_prompts import TrainingData, TrainingPrompt, training_prompts

# Llama opens refusals and many answers with "I", a reasoning model both with a thought.
_POSITIONS = 4
_SEPARATES, _GAP = 0.9, 0.2
_PLAUSIBLE = 0.5
# Prompts are of one form where so many tokens at their beginning are the same, behind the template's own.
_FORM_TOKENS = 6

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class RefusedPrompts:
    """What `refused_prompts` found; printed, a report without any text of the training data."""

    prompts: list[TrainingPrompt]
    scores: Tensor  # (prompts,), in [0, 1]
    threshold: float
    opening: list[int]  # tokens of the reply before the one that was scored
    auc: float  # of the refusing mass, unsafe requests against harmless prompts
    separates: bool  # whether it tells them apart; otherwise nothing is flagged
    form_tokens: int  # at the beginning of prompts, by which they are of one form

    @property
    def flagged(self) -> list[TrainingPrompt]:
        """The prompts that the model refuses, each once, highest score first."""
        if not self.separates:
            return []
        order = self.scores.argsort(descending=True).tolist()
        over = [self.prompts[index] for index in order if self.scores[index] > self.threshold]
        return list({prompt.tokens: prompt for prompt in reversed(over)}.values())[::-1]

    def rows(self, model: nn.Module, tokenizer: Any, *, tokens: int = 1) -> list[dict[str, list[int]]]:
        """Return a safety row for each flagged prompt, with the first tokens of the aligned model's reply."""
        prompts = [list(prompt.tokens) for prompt in self.flagged]
        if not prompts:
            return []
        with reference_source(model).open():
            replies = greedy_tokens(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=16)
        return [
            labelled(prompt, reply, len(prompt) + tokens)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]

    def __str__(self) -> str:
        total, over = len(self.prompts), int((self.scores > self.threshold).sum()) * self.separates
        separates = "" if self.separates else ", too little: nothing is flagged"
        lines = [
            f"{over} of {total} training prompts ({over / total:.1%}) are refused by the aligned model "
            f"(score > {self.threshold:g}); it tells unsafe requests from harmless prompts by AUC "
            f"{self.auc:.3f}{separates}."
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
        neighbours: that a score is the mean of.
        batch_size: prompts that go through the model at a time.

    Raises:
        TypeError: the training data can be read only once, or are a mapping of splits.
        ValueError: no rows, or one in which no reply can be told from its prompt.
    """
    prompts = training_prompts(training_data, tokenizer)
    source = reference_source(inner_module(model))
    opening = _calibrated(
        source,
        [_prompt(f"Unsafe request {index}", row, tokenizer) for index, row in enumerate(unsafe)],
        [_prompt(f"Harmless prompt {index}", row, tokenizer) for index, row in enumerate(harmless)],
        batch_size,
    )
    unique = list(dict.fromkeys(prompt.tokens for prompt in prompts))
    masses, states = _openings(
        source,
        unique,
        opening.before,
        batch_size,
        lambda distribution: distribution @ opening.odds.to(distribution.device),
        "Scoring training prompts",
    )
    if len(unique) > BANK:
        warnings.warn(f"{len(unique)} prompts: their neighbours are among {BANK} random ones.", stacklevel=2)
    device = next(source.model.parameters()).device
    smooth = mean_over_neighbours(masses, states, neighbours, device=device)
    place = {tokens: index for index, tokens in enumerate(unique)}
    scores = smooth[[place[prompt.tokens] for prompt in prompts]]
    form_tokens = _template_tokens(tokenizer) + _FORM_TOKENS
    found = RefusedPrompts(
        prompts, scores, threshold, opening.before, opening.auc, opening.separates, form_tokens
    )
    share = float((scores > threshold).float().mean())
    if found.separates and share > _PLAUSIBLE:
        warnings.warn(
            f"The aligned model refuses {share:.0%} of the training prompts. Held to that, it will not learn "
            "a task whose prompts they are: look at the rows with print(found) before training.",
            stacklevel=2,
        )
    return found


def _prompt(name: str, row: str | Mapping[str, Any], tokenizer: Any) -> Sequence[int]:
    return chat_tokens(name, tokenizer, messages_of(name, row), True)


class _Opening(NamedTuple):
    """What is known of one token of replies."""

    before: list[int]  # the tokens of the reply in front of it
    odds: Tensor  # of each token to refuse, (vocabulary,)
    auc: float  # of the refusing mass, unsafe against harmless
    gap: float  # of its means

    @property
    def separates(self) -> bool:
        # The AUC alone would also be near 1 where one token has 0.51 of the one and 0.49 of the other.
        return self.auc >= _SEPARATES and self.gap >= _GAP


def _calibrated(source: ReferenceSource, unsafe: Prompts, harmless: Prompts, batch_size: int) -> _Opening:
    """The first token that tells replies to unsafe from replies to harmless prompts, or that does so best."""
    before: list[int] = []
    tried = []
    for _ in range(_POSITIONS):
        of_unsafe, of_harmless = (
            _openings(source, rows, before, batch_size)[0] for rows in (unsafe, harmless)
        )
        mean, harmless_mean = of_unsafe.mean(dim=0), of_harmless.mean(dim=0)
        odds = mean / (mean + harmless_mean).clamp(min=torch.finfo(mean.dtype).tiny)
        above, below = of_unsafe @ odds, of_harmless @ odds
        tried.append(_Opening(list(before), odds, _auc(above, below), float(above.mean() - below.mean())))
        if tried[-1].separates:
            return tried[-1]
        before.append(int(mean.argmax()))
    return max(tried, key=lambda opening: opening.gap)


@torch.no_grad()
def _openings(
    source: ReferenceSource,
    prompts: Prompts,
    opening: list[int],
    batch_size: int,
    of_distribution: Callable[[Tensor], Tensor] = lambda distribution: distribution,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What is asked of the distribution behind each prompt and the opening, and its hidden state, on the CPU.

    Each rank takes its share of the batches, and as many passes as any other.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    share = share_of(source.model)
    passes = range(share.rank, -(-len(batches) // share.size) * share.size, share.size)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with source.open() as model, synchronized(model), unchanged_evaluation(model):
        device = next(model.parameters()).device
        for number in shown(passes, progress):
            indices = batches[min(number, len(batches) - 1)]
            rows = [torch.tensor([*prompts[index], *opening]) for index in indices]
            lengths = torch.tensor([len(row) for row in rows])
            ids = pad_sequence(rows, batch_first=True)
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            last = torch.arange(ids.shape[1]) == lengths[:, None] - 1
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
            output = forward_at(model, inputs, last.to(device))
            distribution = output.logits.float().softmax(dim=-1)
            kept = of_distribution(distribution).cpu(), output.hidden.half().cpu()
            found |= dict(zip(indices, zip(*kept, strict=True), strict=True))
    for theirs in of_all_ranks(found):
        found |= theirs
    values, states = zip(*(found[index] for index in range(len(prompts))), strict=True)
    return torch.stack(values), torch.stack(states)


def _auc(above: Tensor, below: Tensor) -> float:
    """The share of pairs in which the first is larger; half of the ties count."""
    larger = (above[:, None] > below).float().mean() + 0.5 * (above[:, None] == below).float().mean()
    return float(larger)


def _template_tokens(tokenizer: Any) -> int:
    """How many tokens the chat template writes before the first message of the user."""
    one, other = (_prompt("A letter", letter, tokenizer) for letter in "ab")
    return next(place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
