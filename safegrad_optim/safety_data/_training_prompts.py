"""The prompts in training data: what stands before each reply that has a loss."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from safegrad_optim.batches import IGNORE_INDEX
from safegrad_optim.safety_data._messages import messages_of
from safegrad_optim.safety_data._template import chat_tokens

TrainingData = Sequence[str | Mapping[str, Any]]


class TrainingPrompt(NamedTuple):
    """The tokens before one reply, and the row of the training data that it is in."""

    row: int
    tokens: tuple[int, ...]


def training_prompts(data: TrainingData, tokenizer: Any) -> list[TrainingPrompt]:
    """Return the prompts of training data, in their order: of a conversation, one for each reply.

    A row is a text, `{"messages"}`, `{"prompt"}` with or without a response, as in `safety_rows`, or
    tokenised, `{"input_ids", "labels"}`: the tokens before each stretch of labels. Several texts packed into
    one row are told apart by `position_ids`, which start again at 0.

    Raises:
        TypeError: the data can be read only once, or are a mapping of splits.
        ValueError: there are none, or in a row no reply can be told from its prompt.
    """
    if isinstance(data, (Mapping, str)):
        raise TypeError(
            f"The training data are a {type(data).__name__}, expected rows; give one of its splits."
        )
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            f"The training data are a {type(data).__name__}, which is read only once, and their prompts are "
            "scored before training. Give the rows of a list or Dataset, for example list(data.take(10_000))."
        )
    prompts = [
        TrainingPrompt(index, tuple(ids))
        for index, row in enumerate(data)
        for ids in _of(index, row, tokenizer)
    ]
    if not prompts:
        raise ValueError("The training data are empty. Give at least one row with a prompt.")
    return prompts


def _of(index: int, row: Any, tokenizer: Any) -> Iterator[Sequence[int]]:
    name = f"Training row {index}"
    if isinstance(row, Mapping) and "input_ids" in row:
        yield from _before_labels(name, row)
        return
    messages = messages_of(name, row)
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for place in replies or [len(messages)]:
        yield chat_tokens(name, tokenizer, messages[:place], True)


def _before_labels(name: str, row: Mapping[str, Any]) -> Iterator[list[int]]:
    ids, labels = (list(row.get(field, ())) for field in ("input_ids", "labels"))
    if len(labels) != len(ids):
        raise ValueError(
            f"{name} has {len(ids)} input_ids and {len(labels)} labels. Give labels that are {IGNORE_INDEX} "
            "outside the replies, or the rows before they were tokenised: messages, or prompt and response."
        )
    positions = list(row.get("position_ids", range(len(ids))))
    starts = [place for place, position in enumerate(positions) if position == 0]
    replies = [
        place
        for place in range(1, len(ids))
        if labels[place] != IGNORE_INDEX and (labels[place - 1] == IGNORE_INDEX or place in starts)
    ]
    if labels[:1] != [IGNORE_INDEX] or set(starts) & set(replies):
        raise ValueError(
            f"{name} has a loss from its first token on, so no reply can be told from its prompt. Mask the "
            "prompt (TRL: completion_only_loss or assistant_only_loss), or give the rows before tokenising."
        )
    for place in replies:
        yield ids[max(start for start in starts if start < place) : place]
