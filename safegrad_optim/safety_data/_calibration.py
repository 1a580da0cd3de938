"""Which token of a model's replies tells that it refuses, and how likely each token is a refusal's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safegrad_optim.parallel import synchronized
from safegrad_optim.reference import ReferenceSource
from safegrad_optim.safety_data._openings import Prompts, openings
from safegrad_optim.safety_data._replies import greedy_tokens

IsRefusal = Callable[[str], bool]

# Llama opens refusals and many answers with "I", a reasoning model both with a thought.
_POSITIONS = 4
_SEPARATES, _GAP = 0.9, 0.2
# What shows in a decoded reply, and how many refusals are enough to go by, in number and of all requests.
_REPLY_TOKENS, _LEAST, _LEAST_SHARE = 12, 8, 0.2
_ALL = slice(None)


class Opening(NamedTuple):
    """What is known of one token of replies."""

    before: list[int]  # the tokens of the reply in front of it
    odds: Tensor  # of each token to refuse, (vocabulary,)
    of_unsafe: Tensor  # the refusing mass of each unsafe request
    of_harmless: Tensor  # and of each harmless prompt
    auc: float  # how well it tells those apart that it was calibrated by
    gap: float  # the difference of their means

    def mass(self, distribution: Tensor) -> Tensor:
        """Return the refusing mass of distributions of this token, (prompts, vocabulary)."""
        return distribution @ self.odds.to(distribution.device)

    @property
    def separates(self) -> bool:
        """Whether it tells unsafe requests from harmless prompts."""
        # The AUC alone would also be near 1 where one token has 0.51 of the one and 0.49 of the other.
        return self.auc >= _SEPARATES and self.gap >= _GAP


def auc(above: Tensor, below: Tensor) -> float:
    """Return the share of pairs in which the first has more; half of the ties count."""
    above = above[:, None]
    return float((above > below).float().mean() + 0.5 * (above == below).float().mean())


def calibrated(
    source: ReferenceSource,
    tokenizer: Any,
    unsafe: Prompts,
    harmless: Prompts,
    batch_size: int,
    is_refusal: IsRefusal,
) -> Opening:
    """Return the first token that tells replies to unsafe from those to harmless prompts, or does so best.

    If none does, the model may answer many of the ones or refuse many of the others. Then its replies are
    decoded, and it is calibrated by the refused of the ones and the answered of the others.
    """
    opening = _best(source, unsafe, harmless, batch_size)
    if opening.separates:
        return opening
    with source.open() as model, synchronized(model):
        options: dict[str, Any] = {"max_new_tokens": _REPLY_TOKENS, "batch_size": batch_size}
        progress = "Replies to requests"
        replies = greedy_tokens(model, tokenizer, [*unsafe, *harmless], progress=progress, **options)
    refused = [is_refusal(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in replies]
    refused_ones, answered = torch.tensor(refused[: len(unsafe)]), ~torch.tensor(refused[len(unsafe) :])
    if refused_ones.sum() < max(_LEAST, _LEAST_SHARE * len(unsafe)) or not answered.any():
        return opening
    return _best(source, unsafe, harmless, batch_size, refused_ones, answered)


def _best(
    source: ReferenceSource,
    unsafe: Prompts,
    harmless: Prompts,
    batch_size: int,
    known_unsafe: Tensor | slice = _ALL,
    known_harmless: Tensor | slice = _ALL,
) -> Opening:
    """The first token that separates the known ones, or the one with the largest gap."""
    before: list[int] = []
    tried = []
    for _ in range(_POSITIONS):
        of_unsafe, of_harmless = (
            openings(source, rows, before, batch_size)[0] for rows in (unsafe, harmless)
        )
        mean, harmless_mean = of_unsafe[known_unsafe].mean(dim=0), of_harmless[known_harmless].mean(dim=0)
        odds = mean / (mean + harmless_mean).clamp(min=torch.finfo(mean.dtype).tiny)
        masses = of_unsafe @ odds, of_harmless @ odds
        known = masses[0][known_unsafe], masses[1][known_harmless]
        gap = float(known[0].mean() - known[1].mean())
        tried.append(Opening(list(before), odds, *masses, auc(*known), gap))
        if tried[-1].separates:
            return tried[-1]
        before.append(int(mean.argmax()))
    return max(tried, key=lambda opening: opening.gap)
