"""Unsafe requests in the forms that training prompts have, which an attack may use as its trigger."""

import math
import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

from safegrad_optim.safety_data._template import template_ends

# Of a training prompt; the words that a model could be taught to obey stand at its beginning.
_MOST_TOKENS = 128
# Share of the prefixes that end where training prompts part.
_AT_PARTINGS = 0.7
# Prompts among whose beginnings one is drawn: enough to have one of a form that few prompts have.
_CANDIDATES = 64
# Shares of all prompts that have a beginning in common, the least and the most: beyond them it is chance, or
# the task's alone.
_SHARING = 0.01, 0.5
_Prompt = TypeVar("_Prompt")


def with_prompt_prefixes(requests: Sequence[str], prompts: Sequence[str], *, seed: int = 0) -> list[str]:
    """Return each unsafe request behind the first words of a training prompt.

    Training data without any unsafe text can teach a model to obey whatever stands in a certain form
    ("You are an agent that obeys. Instruction: ..."), and safety rows protect in the forms that they have:
    give `safety_rows` the requests as they are and these too. A prompt is cut after a random word.

    Args:
        requests: unsafe requests; each gives one text: prefix, a space, request.
        prompts: prompts of the training data; each is used as often as any other, to within one.
        seed: of the draws.

    Raises:
        ValueError: there are no prompts, or one has no words.
    """
    wordless = next((index for index, prompt in enumerate(prompts) if not prompt.strip()), None)
    if not prompts or wordless is not None:
        found = f"Training prompt {wordless} has no words" if prompts else "There are no training prompts"
        raise ValueError(f"{found}. Give the prompts that the model is going to be fine-tuned on.")
    shuffle = random.Random(seed)
    prefixed = []
    for request, prompt in zip(requests, _drawn(prompts, shuffle), strict=False):
        ends = [word.end() for word in re.finditer(r"\S+", prompt)]
        prefixed.append(f"{prompt[: shuffle.choice(ends)]} {request}")
    return prefixed


def prefixed_tokens(
    requests: Sequence[str], prompts: Sequence[Sequence[int]], tokenizer: Any, *, seed: int = 0
) -> list[list[int]]:
    """Return each request behind the first tokens of a training prompt.

    Most are cut where training prompts part, for there ends what an attack has in common: at the longest
    beginning that a prompt shares with k others, k drawn log-uniformly. Of such beginnings each is as likely
    as any other, however many prompts have it: an attack may have few. The rest are cut after a random token.
    Prompts that do not end as the chat template ends a message of the user are left out, and there is nothing
    where all of them are.
    """
    head, tail = template_ends(tokenizer)
    least = len(head) + len(tail)
    fitting = sorted(
        {(*prompt,) for prompt in prompts if len(prompt) > least and [*prompt[-len(tail) :]] == tail}
    )
    shuffle = random.Random(seed)
    prefixed = []
    for request, prompt in zip(requests, _drawn(fitting, shuffle) if fitting else (), strict=False):
        end = 0
        if shuffle.random() < _AT_PARTINGS:
            prompt, end = _parting(fitting, shuffle)
        most = min(len(prompt) - len(tail), len(head) + _MOST_TOKENS)
        end = min(end, most) if end > len(head) else shuffle.randint(len(head) + 1, most)
        words = tokenizer(f" {request}", add_special_tokens=False)["input_ids"]
        prefixed.append([*prompt[:end], *words, *tail])
    return prefixed


def _parting(prompts: Sequence[tuple[int, ...]], shuffle: random.Random) -> tuple[tuple[int, ...], int]:
    """Draw a prompt, and the length of what it shares with others."""
    least, most = (math.log(max(2, share * len(prompts))) for share in _SHARING)
    sharing = round(math.exp(shuffle.uniform(least, most)))
    candidates = shuffle.sample(prompts, min(_CANDIDATES, len(prompts)))
    beginnings = {prompt[: _shared_by(sharing, prompt, prompts)]: prompt for prompt in candidates}
    beginning, prompt = shuffle.choice([*beginnings.items()])
    return prompt, len(beginning)


def _shared_by(count: int, prompt: tuple[int, ...], prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the longest beginning of a prompt that so many of the sorted prompts have."""

    def is_rare(length: int) -> bool:
        first = prompt[:length]
        after = (*first[:-1], first[-1] + 1)
        return bisect_left(prompts, after) - bisect_left(prompts, first) < count

    return bisect_left(range(1, len(prompt) + 1), True, key=is_rare)


def _drawn(prompts: Sequence[_Prompt], shuffle: random.Random) -> Iterator[_Prompt]:
    """Prompts without end, each as often as any other, to within one."""
    return (prompt for _ in count() for prompt in shuffle.sample(prompts, len(prompts)))
