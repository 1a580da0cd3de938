"""Safety rows from text: conversations whose last reply, given or the aligned model's own, is labelled."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

from torch import nn

from safegrad_optim.batches import IGNORE_INDEX
from safegrad_optim.parallel import inner_module, synchronized
from safegrad_optim.reference import reference_source
from safegrad_optim.safety_data._jsonl import read_jsonl
from safegrad_optim.safety_data._replies import greedy_tokens, is_refusal

SafetyData = Iterable[Mapping[str, Any] | str] | str | PathLike[str]
Message = Mapping[str, Any]

_FORMATS = "'messages', or 'prompt' with or without 'response' (or 'completion')"


def safety_rows(
    data: SafetyData,
    tokenizer: Any,
    *,
    model: nn.Module | None = None,
    max_length: int = 512,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    on_compliance: Literal["raise", "drop"] = "raise",
) -> list[dict[str, list[int]]]:
    """Return safety rows for `KLAlignment`: each conversation with its last reply labelled.

    labels_t = input_ids_t for t in the last reply through its end-of-turn token, else -100

    A bare request gets the reply that `model` writes: greedy, and without an end-of-turn token where
    `max_new_tokens` cut it. Replies that are given are not judged.

    Args:
        data: rows in a list or `Dataset`, or the path of a JSONL file. A row is `{"messages": [...]}`,
            `{"prompt", "response"}` (or "completion"; both texts or messages), `{"prompt"}` or a text.
        tokenizer: the model's tokenizer, with a chat template.
        model: the aligned model, which replies to bare requests; with its PEFT adapters switched off.
        max_length: tokens a row; longer replies are cut at the right.
        max_new_tokens, batch_size: tokens of a reply of the model, and requests that it replies to at a time.
        on_compliance: where the model does not refuse: "raise", or "drop" the row with a warning.

    Returns:
        One dict of `input_ids`, `attention_mask` and `labels` for each row, in their order.

    Raises:
        ValueError: a bad option, no chat template, no rows; a row that is malformed, has no reply and
            no `model` to write one, or whose reply does not fit; a reply of the model that complies.
        TypeError: `data` is a mapping, for example all splits of a dataset.
        FileNotFoundError: there is no such file.
        jinja2.TemplateError: the chat template refuses a row; a note of the error names it.
    """
    if on_compliance not in ("raise", "drop"):
        raise ValueError(f"on_compliance is {on_compliance!r}, expected 'raise' or 'drop'.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected a whole number >= 1.")
    if getattr(tokenizer, "chat_template", None) is None:
        found = f"The {type(tokenizer).__name__} has no chat template, which says where a reply starts"
        raise ValueError(f"{found}. Set tokenizer.chat_template, or use the aligned chat model's tokenizer.")
    turns = {name: _tokens(name, row, tokenizer, max_length) for name, row in _named_rows(data)}
    if not turns:
        raise ValueError(f"The safety data are empty. Give at least one row: a mapping with {_FORMATS}.")
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
                f"remove them, or leave them out by on_compliance='drop'{end}"
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
    if tokens[: len(prompt)] != prompt:
        expected, found = (tokenizer.decode(ids[: len(prompt)])[-40:] for ids in (prompt, tokens))
        raise ValueError(
            f"{name}: the conversation does not start with the tokens of its prompt, then the response. "
            f"Expected {expected!r} before it, found {found!r}. Remove white space before the response, or "
            "use a chat template that writes a prompt alike with and without a reply."
        )
    return prompt, _through_end_of_turn(tokens[len(prompt) :], tokenizer)


def messages_of(name: str, row: Any) -> list[Message]:
    """The messages of a row in any of the known formats, checked; `name` is how errors call it."""
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} is a {type(row).__name__}, expected a text or a mapping with {_FORMATS}.")
    # A Dataset fills the fields that a row lacks with None.
    known = ("messages", "prompt", "response", "completion")
    fields = {field: row[field] for field in known if row.get(field) is not None}
    if set(fields) not in ({"messages"}, {"prompt"}, {"prompt", "response"}, {"prompt", "completion"}):
        raise ValueError(f"{name} has the fields {sorted(map(str, row))}, expected {_FORMATS}.")
    messages: list[Message] = []
    for field, value in fields.items():
        if isinstance(value, str):
            value = [{"role": "user" if field == "prompt" else "assistant", "content": value}]
        if not isinstance(value, Sequence) or not all(map(_is_message, value)):
            raise ValueError(
                f"{name}: '{field}' is no text or list of messages. A message is a mapping with a 'role' "
                f"and a 'content', both texts; found {str(value)[:80]!r}."
            )
        messages += value
    role = messages[-1]["role"] if messages else None
    expected = ("assistant",) if len(fields) == 2 else ("user", "assistant")
    if role not in expected or (role == "assistant" and len(messages) == 1):
        raise ValueError(
            f"{name}: its messages have the roles {[message['role'] for message in messages]}, expected a "
            f"message to reply to and {' or '.join(expected)} as the last."
        )
    if not messages[-1]["content"].strip():
        found = "response" if role == "assistant" else "request"
        raise ValueError(f"{name}: its {found} is empty. Give it a text, or remove the row.")
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def prompt_tokens(name: str, row: Any, tokenizer: Any) -> list[int]:
    """The tokens of a row without a reply, through what opens one; `name` is how errors call it."""
    return chat_tokens(name, tokenizer, messages_of(name, row), True)


def chat_tokens(name: str, tokenizer: Any, messages: list[Message], reply_follows: bool) -> list[int]:
    """The tokens of messages in the chat template, with what opens a reply if one follows."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_follows)
    except BaseException as error:  # a template raises what it likes
        roles = [message["role"] for message in messages]
        error.add_note(f"{name}: the chat template was given the roles {roles}. Give those it knows.")
        raise
    # The chat template has written the special tokens already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def template_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the chat template writes before the only message of a user, and behind it."""
    one, other = (
        chat_tokens("A letter", tokenizer, [{"role": "user", "content": letter}], True) for letter in "ab"
    )
    place = next(index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return one[:place], one[place + 1 :]


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
