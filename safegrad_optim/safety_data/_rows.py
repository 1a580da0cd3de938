"""Safety rows from text: conversations whose last reply, given or the aligned model's own, is labelled."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from torch import nn

from safegrad_optim.batches import IGNORE_INDEX
from safegrad_optim.parallel import inner_module, synchronized
from safegrad_optim.reference import reference_source
from safegrad_optim.safety_data._jsonl import read_jsonl
from safegrad_optim.safety_data._messages import FORMATS, messages_of
from safegrad_optim.safety_data._refusals import is_refusal
from safegrad_optim.safety_data._replies import greedy_tokens
from safegrad_optim.safety_data._template import (
    chat_tokenizer,
    chat_tokens,
    opens_thought,
    shared_length,
)

SafetyData = Iterable[Mapping[str, Any] | str] | str | PathLike[str]


def safety_rows(
    data: SafetyData,
    tokenizer: Any,
    *,
    model: nn.Module | None = None,
    max_length: int = 512,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    on_compliance: Literal["raise", "drop"] = "raise",
    is_refusal: Callable[[str], bool] = is_refusal,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, list[int]]]:
    """Return safety rows for `KLAlignment`: each conversation with its last reply labelled.

    labels_t = input_ids_t for t in the last reply through its end-of-turn token, else -100

    A bare request gets the reply that `model` writes: greedy, and without an end-of-turn token where
    `max_new_tokens` cut it. Replies that are given are not judged. Where the template opens a thought for a
    reply and a given one has none, it is labelled from where the two part.

    Args:
        data: rows in a list or `Dataset`, or the path of a JSONL file. A row is `{"messages": [...]}`,
            `{"prompt", "response"}` (or "completion"; both texts or messages), `{"prompt"}` or a text. The
            content of a message is a text, or a list of parts of type "text".
        tokenizer: the model's tokenizer, or processor for rows without images, with a chat template.
        model: the aligned model, which replies to bare requests; with its PEFT adapters switched off.
        max_length: tokens a row; longer replies are cut at the right.
        max_new_tokens, batch_size: tokens of a reply of the model, and requests that it replies to at a time.
        on_compliance: where the model does not refuse: "raise", or "drop" the row with a warning.
        is_refusal: tells whether a reply of the model refuses.
        chat_template_kwargs: what else the chat template is given, such as `enable_thinking`, or the
            `date_string` of templates that write the day's date: with it rows are the same on another day.

    Returns:
        One dict of `input_ids`, `attention_mask` and `labels` for each row, in their order.

    Raises:
        ValueError: a bad option, no chat template, no rows; a row that is malformed, has no reply and
            no `model` to write one, whose text the template drops, or whose reply does not fit; a reply of
            the model that complies.
        TypeError: `data` is a mapping, for example all splits of a dataset.
        FileNotFoundError: there is no such file.
        jinja2.TemplateError: the chat template refuses a row; a note of the error names it.
    """
    if on_compliance not in ("raise", "drop"):
        raise ValueError(f"on_compliance is {on_compliance!r}, expected 'raise' or 'drop'.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected a whole number >= 1.")
    tokenizer = chat_tokenizer(tokenizer, chat_template_kwargs)
    turns = {name: _tokens(name, row, tokenizer, max_length) for name, row in _named_rows(data)}
    if not turns:
        raise ValueError(f"The safety data are empty. Give at least one row: a mapping with {FORMATS}.")
    bare = {name: prompt for name, (prompt, response) in turns.items() if response is None}
    replies: dict[str, list[int]] = {}
    if bare:
        if model is None:
            raise ValueError(
                f"{len(bare)} of {len(turns)} safety rows have no response (first: {next(iter(bare))}). "
                "Give each a 'response', or the aligned model as model= to write its own."
            )
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        options["progress"] = "Replies to safety requests"
        with reference_source(model).open():
            written = greedy_tokens(model, tokenizer, [*bare.values()], **options)
        replies = dict(zip(bare, written, strict=True))
    texts = {name: tokenizer.decode(reply, skip_special_tokens=True) for name, reply in replies.items()}
    complied = {name: text.strip() for name, text in texts.items() if not is_refusal(text)}
    kept = {name: turn for name, turn in turns.items() if name not in complied}
    if complied:
        shown = "; ".join(f"{name}: {text[:60]!r}" for name, text in list(complied.items())[:3])
        found = f"The model does not refuse {len(complied)} of {len(bare)} bare requests (first: {shown})."
        if on_compliance == "raise" or not kept:
            end = "." if kept else "; but then no row is left. Is this the aligned model?"
            raise ValueError(
                f"{found} Such replies would protect compliance. Give these rows a 'response' that refuses, "
                "remove them, or leave them out by on_compliance='drop'; if they refuse in other words, give "
                f"is_refusal= a function that knows these{end}"
            )
        warnings.warn(f"{found} They are left out; rows kept: {len(kept)}.", stacklevel=2)
    responses = {name: response for name, (_, response) in kept.items() if response is not None} | replies
    return [labelled(prompt, responses[name], max_length) for name, (prompt, _) in kept.items()]


def _named_rows(data: SafetyData) -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        raise TypeError(
            f"The safety data are a {type(data).__name__} with {sorted(data)}, expected rows. Give one "
            "of its splits, or a list with the row in it."
        )
    if isinstance(data, (str, PathLike)):
        return read_jsonl(data)
    return ((f"Safety row {index}", row) for index, row in enumerate(data))


def _tokens(name: str, row: Any, tokenizer: Any, max_length: int) -> tuple[list[int], list[int] | None]:
    """Tokens of a row's prompt and of its reply, if it has one."""
    messages = messages_of(name, row)
    replied = messages[-1]["role"] == "assistant"
    prompt = chat_tokens(name, tokenizer, messages[:-1] if replied else messages, True)
    if len(prompt) >= max_length:
        found = f"{name}: its prompt has {len(prompt)} tokens and max_length is {max_length}"
        raise ValueError(f"{found}, which leaves no response. Raise max_length, or shorten the prompt.")
    if not replied:
        return prompt, None
    tokens = chat_tokens(name, tokenizer, messages, False)
    start = shared_length(prompt, tokens)
    if start < len(prompt) and opens_thought(tokenizer, prompt):
        bare = chat_tokens(name, tokenizer, messages[:-1], False)
        prompt = prompt[: max(start, len(bare))]
    if start < len(prompt):
        expected, found = (tokenizer.decode(ids[: len(prompt)])[-40:] for ids in (prompt, tokens))
        raise ValueError(
            f"{name}: the conversation does not start with the tokens of its prompt, then the response. "
            f"Expected {expected!r} before it, found {found!r}. Remove white space before the response, or "
            "use a chat template that writes a prompt alike with and without a reply."
        )
    return prompt, _through_end_of_turn(tokens[len(prompt) :], tokenizer)


def _through_end_of_turn(response: list[int], tokenizer: Any) -> list[int]:
    """The response without what templates write after its end of turn: white space, the end of text."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    end = len(response)
    for index in reversed(range(len(response))):
        if response[index] in special:
            end = index + 1
        elif tokenizer.decode([response[index]]).strip():
            break
    return response[:end]


def opening_rows(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, batch_size: int = 16
) -> list[dict[str, list[int]]]:
    """A row for each prompt, with the first tokens of the aligned model's own reply."""
    with reference_source(inner_module(model)).open() as reference, synchronized(reference):
        replies = greedy_tokens(reference, tokenizer, prompts, max_new_tokens=tokens, batch_size=batch_size)
    return [
        labelled(list(prompt), reply, len(prompt) + tokens)
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


def labelled(prompt: list[int], response: list[int], max_length: int) -> dict[str, list[int]]:
    """A row whose response alone is labelled."""
    ids = (prompt + response)[:max_length]
    labels = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
