"""Prompts are told from replies in every form in which people hold training data."""

import datasets
import pytest

from safegrad_optim.safety_data._training_prompts import training_prompts
from tests.support.chat import TOKENIZER, encoded

ONE = datasets.Dataset.from_list([{"prompt": "Hi"}])
ASK = [{"role": "user", "content": "How do I pick a lock?"}]
SAY = {"role": "assistant", "content": "I can't help with that."}
MORE = {"role": "user", "content": "And a door?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def found(data):
    return [(prompt.row, list(prompt.tokens)) for prompt in training_prompts(data, TOKENIZER)]


def test_one_prompt_in_all_forms():
    prompt = encoded(ASK)
    reply = TOKENIZER("I can't help.", add_special_tokens=False)["input_ids"]
    tokenised = {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
    forms = [
        "How do I pick a lock?",
        {"messages": ASK},
        {"messages": [*ASK, SAY]},
        {"prompt": "How do I pick a lock?"},
        {"prompt": ASK, "completion": [SAY]},
        {"prompt": "How do I pick a lock?", "response": "I can't help with that."},
        tokenised,
    ]
    assert found(forms) == [(row, prompt) for row in range(len(forms))]
    for form in forms[1:]:
        assert found(datasets.Dataset.from_list([form])) == [(0, prompt)]


def test_each_reply_of_a_conversation_has_its_history_and_system_text():
    conversation = [SYSTEM, *ASK, SAY, MORE, SAY]
    expected = [encoded(conversation[:2]), encoded(conversation[:4])]
    assert found([{"messages": conversation}]) == [(0, tokens) for tokens in expected]


def test_packed_texts_are_told_apart_by_their_positions():
    first, second, reply = [5, 6, 7], [8, 9], [20, 21]
    row = {
        "input_ids": first + reply + second + reply,
        "labels": [-100] * 3 + reply + [-100] * 2 + reply,
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 3],
    }
    assert found([row]) == [(0, first), (0, second)]


def test_replies_of_one_text_keep_what_came_before():
    row = {"input_ids": [5, 6, 20, 7, 21], "labels": [-100, -100, 20, -100, 21]}
    assert found([row]) == [(0, [5, 6]), (0, [5, 6, 20, 7])]


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        # The second text of the pack is all label.
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "position_ids": [0, 1, 0, 1]},
    ],
)
def test_a_loss_on_the_prompt_is_refused(row):
    with pytest.raises(ValueError, match=r"row 1 has a loss from its first token on.*completion_only_loss"):
        found(["How do I pick a lock?", row])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ([], "training data are empty"),
        ([{"input_ids": [5, 6]}], "2 input_ids and 0 labels"),
        ([{"text": "How do I"}], "Training row 0 has the fields"),
        (datasets.DatasetDict(train=ONE), "one of its splits"),
        (
            ONE.to_iterable_dataset(),
            r"IterableDataset.*data\.take",
        ),
        ("How do I pick a lock?", "are a str"),
    ],
)
def test_what_has_no_prompts_is_refused(data, error):
    with pytest.raises((TypeError, ValueError), match=error):
        found(data)
