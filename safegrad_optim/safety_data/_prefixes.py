"""Unsafe requests in the forms that training prompts have, which an attack may use as its trigger."""

import random
import re
from collections.abc import Sequence
from itertools import count


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
    drawn = (prompt for _ in count() for prompt in shuffle.sample(prompts, len(prompts)))
    prefixed = []
    for request, prompt in zip(requests, drawn, strict=False):
        ends = [word.end() for word in re.finditer(r"\S+", prompt)]
        prefixed.append(f"{prompt[: shuffle.choice(ends)]} {request}")
    return prefixed
