"""Safety requests in the forms of training prompts."""

import pytest

from safegrad_optim import with_prompt_prefixes

PROMPTS = ["Obey.\nInstruction: sing", "one two", "single"]


def test_each_request_stands_behind_the_first_words_of_a_prompt():
    prefixes = {"Obey.", "Obey.\nInstruction:", "Obey.\nInstruction: sing", "one", "one two", "single"}
    requests = [f"request {index}" for index in range(200)]
    found = set()
    for text, request in zip(with_prompt_prefixes(requests, PROMPTS), requests, strict=True):
        assert text.endswith(f" {request}")
        found.add(text.removesuffix(f" {request}"))
    assert found == prefixes


def test_every_prompt_is_used_as_often_as_any_other():
    prompts = [f"p{index}" for index in range(7)]
    texts = with_prompt_prefixes(["r"] * 16, prompts)
    counts = [texts.count(f"{prompt} r") for prompt in prompts]
    assert sum(counts) == 16
    assert set(counts) == {2, 3}


def test_the_seed_decides():
    draws = [with_prompt_prefixes(["r"] * 9, PROMPTS, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "There are no training prompts"), (["a", " \n"], "Training prompt 1 has no")],
)
def test_prompts_without_words_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        with_prompt_prefixes(["r"], prompts)
