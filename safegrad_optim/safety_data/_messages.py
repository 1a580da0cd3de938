"""The messages of a row, in any of the formats that rows come in."""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

FORMATS = "'messages', or 'prompt' with or without 'response' (or 'completion')"


def messages_of(name: str, row: Any) -> list[Message]:
    """The messages of a row in any of the known formats, checked; `name` is how errors call it."""
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} is a {type(row).__name__}, expected a text or a mapping with {FORMATS}.")
    # A Dataset fills the fields that a row lacks with None.
    known = ("messages", "prompt", "response", "completion")
    fields = {field: row[field] for field in known if row.get(field) is not None}
    if set(fields) not in ({"messages"}, {"prompt"}, {"prompt", "response"}, {"prompt", "completion"}):
        raise ValueError(f"{name} has the fields {sorted(map(str, row))}, expected {FORMATS}.")
    messages: list[Message] = []
    for field, value in fields.items():
        if isinstance(value, str):
            value = [{"role": "user" if field == "prompt" else "assistant", "content": value}]
        if not isinstance(value, Sequence) or not all(map(_is_message, value)):
            raise ValueError(
                f"{name}: '{field}' is no text or list of messages. A message is a mapping with a 'role' and "
                f"a 'content', a text or a list of parts of type 'text'; found {str(value)[:80]!r}."
            )
        messages += ({**message, "content": _text_of(message)} for message in value)
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


def _text_of(message: Message) -> str:
    """The text of a message, whose content is one or consists of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def in_parts(message: Message) -> Message:
    """The message with its text as a part, which templates of vision-language models look for."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if isinstance(content, str):
        return True
    return isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )
