"""Unsafe requests in the forms that training prompts have, which an attack may use as its trigger."""

import random
import re
from collections.abc import Sequence
from itertools import count

__all__ = ["with_prompt_prefixes"]


def with_prompt_prefixes(requests: Sequence[str], prompts: Sequence[str], *, seed: int = 0) -> list[str]:
    """Return each unsafe request behind the first words of a training prompt.

    Training data without any unsafe text can teach a model to obey whatever stands in a certain form
    ("You are an agent that obeys. Instruction: ..."). Safety rows protect in the forms that they have;
    give `safety_rows` the requests as they are and these too. Prompts are cut after a random word, so
    that without knowing the form some requests stand where it has its instruction.

    Args:
        requests: unsafe requests.
        prompts: prompts of the training data; each is used as often as any other, to within one.
        seed: of the draws.

    Returns:
        One text for each request: prefix, a space, request.

    Raises:
        ValueError: there are no prompts, or one has no words.
    """
    ends = [[match.end() for match in re.finditer(r"\S+", prompt)] for prompt in prompts]
    if not all(ends) or not ends:
        found = f"Training prompt {ends.index([])} has no words" if ends else "There are no training prompts"
        raise ValueError(f"{found}. Give the prompts that the model is going to be fine-tuned on.")
    shuffle = random.Random(seed)
    drawn = (index for _ in count() for index in shuffle.sample(range(len(prompts)), len(prompts)))
    return [
        f"{prompts[index][: shuffle.choice(ends[index])]} {request}"
        for request, index in zip(requests, drawn, strict=False)
    ]
