"""Rows of what a chat template makes of messages, with templates that people have."""

import datetime
import warnings
from unittest import mock

import pytest
import transformers
from transformers.utils import chat_template_utils

from safegrad_optim import safety_rows
from tests.support.chat import CHATML, PAIR, REQUEST, TOKENIZER, chat_model, tokenizer

PARTS = CHATML.replace(
    "message['content'] +", "message['content'] | map(attribute='text') | select('string') | join +"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")


def part(text):
    return [{"type": "text", "text": text}]


def in_parts(row):
    return {
        "messages": [
            {"role": "user", "content": part(row["prompt"])},
            {"role": "assistant", "content": part(row["response"])},
        ]
    }


def processor(template):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = transformers.CLIPImageProcessorPil()
        return transformers.LlavaProcessor(images, tokenizer(), patch_size=14, chat_template=template)


@pytest.mark.parametrize("row", [PAIR, in_parts(PAIR)])
@pytest.mark.parametrize("made", [tokenizer(), tokenizer(PARTS), processor(CHATML), processor(PARTS)])
def test_texts_and_parts_are_one(row, made):
    assert safety_rows([row], made) == safety_rows([PAIR], TOKENIZER)


@pytest.mark.parametrize("content", [[{"type": "image"}], [{"type": "text"}], [REQUEST], 7])
def test_what_is_no_text_is_refused(content):
    row = {"messages": [{"role": "user", "content": content}], "response": None}
    with pytest.raises(ValueError, match="row 0: 'messages' is no text or list of messages"):
        safety_rows([row], TOKENIZER, model=chat_model())


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message['content']", "''"),
        CHATML.replace("message['content']", "message['content'][:9]"),
        CHATML.replace("message['content']", "message['text'] | default('')"),
        "{% for message in messages %}{% if message['role'] == 'human' %}"
        + CHATML
        + "{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_drops_a_text_is_refused(template):
    with pytest.raises(ValueError, match="row 0: the chat template drops the text of its last message"):
        safety_rows([PAIR], tokenizer(template))


def test_a_template_that_drops_replies_is_refused():
    template = CHATML.replace("+ message['content'] +", "+ (message['content'] if loop.first else '') +")
    with pytest.raises(ValueError, match="drops the text of its last message, of role 'assistant'"):
        safety_rows([PAIR], tokenizer(template))


def test_a_reply_without_the_thought_that_the_template_opens_is_labelled():
    made = tokenizer(THINKING)
    (row,) = safety_rows([PAIR], made)
    (plain,) = safety_rows([PAIR], TOKENIZER)
    assert made.decode(row["input_ids"]) == TOKENIZER.decode(plain["input_ids"])
    assert row["labels"] == plain["labels"]


def test_a_template_is_given_its_arguments():
    dated = tokenizer(CHATML.replace("{{ '<s>' }}", "{{ '<s>' + (day or strftime_now('%d %b %Y')) }}"))

    def rows_on(day, **options):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        with mock.patch.object(chat_template_utils, "datetime", Day):
            return safety_rows([PAIR], dated, **options)

    assert rows_on("2026-01-02") != rows_on("2026-01-03")
    fixed = {"chat_template_kwargs": {"day": "02 Jan 2026"}}
    assert rows_on("2026-01-02") == rows_on("2026-01-02", **fixed) == rows_on("2026-01-03", **fixed)


def test_the_users_word_on_what_refuses_counts():
    model = chat_model()
    texts = []
    (row,) = safety_rows([REQUEST], TOKENIZER, model=model, is_refusal=lambda text: not texts.append(text))
    assert texts == [TOKENIZER.decode([t for t in row["labels"] if t != -100], skip_special_tokens=True)]
    with pytest.raises(ValueError, match="in other words, give is_refusal="):
        safety_rows([REQUEST], TOKENIZER, model=model, is_refusal=lambda text: False)
