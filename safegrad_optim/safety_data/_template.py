"""Messages in the model's chat template: their tokens, and that nothing of them is lost."""

from collections.abc import Mapping, Sequence
from typing import Any

from safegrad_optim.safety_data._messages import Message, in_parts, messages_of


class _ChatTokenizer:
    """A tokenizer, and the chat template of it or of the processor that it is in."""

    def __init__(self, given: Any, options: Mapping[str, Any]) -> None:
        self._given, self._options = given, dict(options)
        self._tokenizer = given.tokenizer if _is_processor(given) else given

    def apply_chat_template(self, messages: Sequence[Message], *, tokenize: bool, **options: Any) -> Any:
        options = self._options | options
        if not tokenize or self._tokenizer is self._given:
            return self._given.apply_chat_template(messages, tokenize=tokenize, **options)
        # A processor would look for images; the tokens of a text are those of its tokenizer.
        text = self._given.apply_chat_template(messages, tokenize=False, **options)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def chat_tokenizer(tokenizer: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Return a tokenizer with a chat template, which is given these options too; of a processor, its own.

    Raises:
        ValueError: there is no chat template.
    """
    _require_template(tokenizer)
    if options or _is_processor(tokenizer):
        return _ChatTokenizer(tokenizer, options or {})
    return tokenizer


def _is_processor(given: Any) -> bool:
    return hasattr(getattr(given, "tokenizer", None), "apply_chat_template")


def _require_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not say where a reply starts."""
    if getattr(tokenizer, "chat_template", None) is not None:
        return
    try:
        # Those of mistral-common have one that is no attribute.
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except Exception as error:
        found = f"The {type(tokenizer).__name__} has no chat template, which says where a reply starts"
        raise ValueError(
            f"{found}. Set tokenizer.chat_template, or use the aligned chat model's tokenizer."
        ) from error


def prompt_tokens(name: str, row: Any, tokenizer: Any) -> list[int]:
    """The tokens of a row without a reply, through what opens one; `name` is how errors call it."""
    return chat_tokens(name, tokenizer, messages_of(name, row), True)


def chat_tokens(name: str, tokenizer: Any, messages: Sequence[Message], reply_follows: bool) -> list[int]:
    """The tokens of messages in the chat template, with what opens a reply if one follows.

    Raises:
        ValueError: the template drops the text of the last message.
    """
    given = _understood(name, tokenizer, messages, reply_follows)
    # Not those of the text: some tokenizers read control tokens that a text spells as text.
    options = {"tokenize": True, "return_dict": False, "add_generation_prompt": reply_follows}
    return list(tokenizer.apply_chat_template(list(given), **options))


def _understood(
    name: str, tokenizer: Any, messages: Sequence[Message], reply_follows: bool
) -> Sequence[Message]:
    """The messages as the template writes the text of the last one: as they are, or made of parts."""
    said, cause = messages[-1]["content"].strip(), None
    text = _rendered(name, tokenizer, messages, reply_follows)
    if said in text:
        return messages
    parts = [in_parts(message) for message in messages]
    try:
        if said in _rendered(name, tokenizer, parts, reply_follows):
            return parts
    except Exception as error:  # noqa: BLE001 - a template that wants texts raises what it likes
        cause = error
    raise ValueError(
        f"{name}: the chat template drops the text of its last message, of role {messages[-1]['role']!r}. It "
        f"wrote {text[-80:]!r}. Give roles, and template arguments (chat_template_kwargs), that it knows."
    ) from cause


def _rendered(name: str, tokenizer: Any, messages: Sequence[Message], reply_follows: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply_follows
        )
    except BaseException as error:  # a template raises what it likes
        roles = [message["role"] for message in messages]
        error.add_note(f"{name}: the chat template was given the roles {roles}. Give those it knows.")
        raise
    return text


def opens_thought(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the template opens a thought for the reply, which replies that are given need not have."""
    return str(tokenizer.decode(prompt[-16:])).rstrip().endswith("<think>")


def template_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the chat template writes before the only message of a user, and behind it."""
    one, other = (
        chat_tokens("A letter", tokenizer, [{"role": "user", "content": letter}], True) for letter in "ab"
    )
    place = shared_length(one, other)
    return one[:place], one[place + 1 :]


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both start with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
