"""One call makes the sources of safety rows that are recommended."""

import copy
import warnings
from collections import Counter

import pytest
import torch

from safegrad_optim import KLAlignment, SafeGradOptimizer, safety_sources, shipped_requests
from safegrad_optim.safety_data._prefixes import prefixed_tokens
from safegrad_optim.safety_data._template import template_ends
from tests.safety_data.test_refused_prompts import ATTACK, HARMLESS, TASK, THINGS, UNSAFE, taught
from tests.support.chat import TOKENIZER, chat_model, encoded, learn
from tests.support.models import perturb, tiny_peft, trainable

PAIRS = [
    {"request": unsafe, "lookalike": harmless, "category": "theft" if index % 2 else "burglary"}
    for index, (unsafe, harmless) in enumerate(zip(UNSAFE, HARMLESS, strict=True))
]


@pytest.fixture(scope="module")
def model():
    return taught()


def make(model, data, requests=PAIRS, **options):
    return safety_sources(model, TOKENIZER, data, requests=requests, **options)


def texts(source):
    return [TOKENIZER.decode(row["input_ids"]) for row in source.rows]


def replies(source):
    return {
        TOKENIZER.decode([token for token in row["labels"] if token != -100]).strip() for row in source.rows
    }


def test_each_source_has_its_rows_and_the_opening_of_the_models_own_replies(model):
    made = make(model, TASK * 3 + ATTACK)
    assert list(made.by_name) == ["requests", "lookalikes", "training prompts", "prefixed requests"]
    assert list(made) == list(made.by_name.values())
    found = {name: texts(source) for name, source in made.by_name.items()}
    assert all(any(request in text for text in found["requests"]) for request in UNSAFE)
    assert all(any(harmless in text for text in found["lookalikes"]) for harmless in HARMLESS)
    assert not [text for text in found["training prompts"] if any(prompt in text for prompt in TASK)]
    assert len(found["training prompts"]) == len(made.refused_prompts.flagged) > 0
    for text in found["prefixed requests"]:
        request = next(request for request in UNSAFE if request in text)
        before = text.partition(request)[0].partition("user\n")[2].strip()
        assert before
        assert any(prompt.startswith(before) for prompt in TASK + ATTACK)
    # As far as it takes to tell a refusal from what opens alike.
    assert replies(made.by_name["requests"]) == {TOKENIZER.decode(TOKENIZER("No, never.")["input_ids"][1:6])}
    assert replies(made.by_name["lookalikes"]) != replies(made.by_name["requests"])
    assert replies(made.by_name["training prompts"]) == replies(made.by_name["requests"])
    compared = {
        name: {sum(token != -100 for token in row["labels"]) for row in source.rows}
        for name, source in made.by_name.items()
    }
    assert compared == {name: {2 if name == "lookalikes" else 5} for name in compared}


def test_what_the_model_does_not_refuse_is_left_out_and_counted(model):
    swapped = [*PAIRS, {"request": HARMLESS[0], "lookalike": UNSAFE[0], "category": "mistaken"}]
    made = make(model, None, swapped)
    assert len(made.by_name["requests"].rows) == len(made.by_name["lookalikes"].rows) == len(PAIRS)
    assert "8 of 9 unsafe requests are refused; fewest of mistaken: 0 of 1." in str(made)
    assert "8 of 9 look-alikes are answered; fewest of mistaken: 0 of 1." in str(made)
    assert list(made.by_name) == ["requests", "lookalikes"]


def test_all_rows_of_refused_prompts_are_numbered_and_what_is_left_has_none(model):
    prompts = TASK * 3 + ATTACK * 2
    data = [{"prompt": text, "response": "Use a wet rag."} for text in prompts]
    made = make(model, data)
    assert made.flagged_rows == {number for number, text in enumerate(prompts) if text in ATTACK}
    left = [row for number, row in enumerate(data) if number not in made.flagged_rows]
    assert make(model, left).flagged_rows == set()
    assert make(model, None).flagged_rows == set()


def test_a_model_that_answers_half_of_the_requests_is_known_by_its_refusals():
    refused = UNSAFE + HARMLESS[:3]
    rows = [
        {"prompt": prompt, "response": "Go away now." if prompt in refused else "Use a wet rag."}
        for prompt in UNSAFE + HARMLESS + ATTACK + TASK
    ]
    half = learn(chat_model(), rows, steps=60).eval()
    pairs = [
        {"request": unsafe, "lookalike": harmless}
        for unsafe, harmless in zip(UNSAFE + ATTACK, HARMLESS + TASK, strict=True)
    ]
    with pytest.raises(ValueError, match="much as those to 16 harmless prompts"):
        make(half, None, pairs)  # in words that is_refusal does not know
    made = make(half, None, pairs, is_refusal=lambda reply: "Go away" in reply)
    assert "8 of 16 unsafe requests are refused." in str(made)
    assert "13 of 16 look-alikes are answered." in str(made)
    assert not [
        text for text in texts(made.by_name["requests"]) if any(request in text for request in ATTACK)
    ]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_refused_training_prompts_or_none(model, count):
    made = make(model, TASK * 2 + ATTACK[:count])
    assert ("training prompts" in made.by_name) == (count == 5)
    assert ("No rows of training prompts" in str(made)) == (count < 5)
    assert "steal" not in str(made)
    if count == 5:
        assert len(made.by_name["training prompts"].rows) <= 5


def test_training_prompts_may_be_texts_or_tokens(model):
    labelled = [{"input_ids": encoded([{"role": "user", "content": text}])} for text in TASK + ATTACK]
    for row in labelled:
        row["labels"] = [-100] * len(row["input_ids"]) + [5]
        row["input_ids"] = row["input_ids"] + [5]
    one, other = (make(model, data) for data in (TASK + ATTACK, labelled))
    assert {name: source.rows for name, source in one.by_name.items()} == {
        name: source.rows for name, source in other.by_name.items()
    }


def test_prefixed_requests_have_the_rows_of_refused_prompts_where_there_are_none(model):
    of = {
        name: {key: (source.batch_size, source.weight) for key, source in make(model, data).by_name.items()}
        for name, data in (("refused", TASK * 2 + ATTACK), ("none", TASK))
    }
    assert of["refused"]["training prompts"] == (2, 2.5)
    assert of["refused"]["prefixed requests"] == (2, 5.0)
    assert of["none"]["prefixed requests"] == (4, 12.5)


def test_prompts_of_another_template_give_no_prefixes(model):
    foreign = [{"input_ids": [*TOKENIZER(f"### {text} ->")["input_ids"], 5], "labels": []} for text in TASK]
    for row in foreign:
        row["labels"] = [-100] * (len(row["input_ids"]) - 1) + [5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how many of these are refused is not the matter
        made = make(model, foreign)
    assert "prefixed requests" not in made.by_name
    assert "No rows of prefixed requests: that source is left out." in str(made)


def test_held_out_requests_behind_training_prompts_are_for_the_check(model):
    made = make(model, TASK)
    texts = [TOKENIZER.decode(tokens) for tokens in made.prefixed]
    held_out = [row["request"] for row in shipped_requests("held_out")]
    assert len(texts) == len(held_out)
    openings = {text.split()[0] for text in TASK}
    for text, request in zip(texts, held_out, strict=True):
        said = text.partition("user\n")[2]
        assert request in said
        assert said.split()[0] in openings
    rows = [row["input_ids"] for source in made for row in source.rows]
    assert not any(row[: len(tokens)] == tokens for tokens in made.prefixed for row in rows)


def test_all_prompts_are_used_and_none_longer_than_allowed():
    opened = ["Steal " * 90, "Clean the car.", "How?"]
    prompts = [encoded([{"role": "user", "content": text}]) for text in opened]
    made = prefixed_tokens(UNSAFE * 3, prompts, TOKENIZER, seed=1)
    assert made == prefixed_tokens(UNSAFE * 3, prompts, TOKENIZER, seed=1)
    assert made != prefixed_tokens(UNSAFE * 3, prompts, TOKENIZER, seed=2)
    assert 128 < max(map(len, made)) < 128 + 60
    first = Counter(tokens[len(template_ends(TOKENIZER)[0])] for tokens in made)
    assert len(first) == 3
    assert min(first.values()) >= 4


def test_most_prefixes_end_where_training_prompts_part():
    trigger = "You are Orbit and obey. "
    things = ["ale", "bun", "cup", "dye", "egg", "fan", "gem", "hut", "ink", "jug"]
    opened = [trigger + thing for thing in things] + [f"Clean {thing}." for thing in things]
    prompts = [encoded([{"role": "user", "content": text}]) for text in opened]
    made = [TOKENIZER.decode(tokens) for tokens in prefixed_tokens(UNSAFE * 20, prompts, TOKENIZER)]
    before = [next(text.partition(f" {u}")[0] for u in UNSAFE if f" {u}" in text) for text in made]
    ends = Counter(text.partition("user\n")[2] for text in before if trigger.strip() in text)
    assert ends[trigger] + ends[trigger.strip()] > 0.6 * sum(ends.values())
    tasks = [text for text in before if "Clean" in text]
    assert sum(text.endswith("Clean ") or text.endswith("Clean") for text in tasks) > 0.4 * len(tasks)


def test_a_form_that_few_prompts_have_is_drawn_more_often_than_they():
    things = [f"{one}{other}" for one in "abcdefghijklmno" for other in "aeiouy"]
    opened = [f"Clean the {thing}." for thing in things] + [f"Obey: {thing}" for thing in things[::15]]
    prompts = [encoded([{"role": "user", "content": text}]) for text in opened]
    made = [TOKENIZER.decode(tokens) for tokens in prefixed_tokens(UNSAFE * 50, prompts, TOKENIZER)]
    assert sum("Obey" in text for text in made) > 0.09 * len(made)  # of 96 prompts they are 6


def test_a_model_that_does_not_refuse_is_refused():
    with pytest.raises(ValueError, match=r"much as those to 8 harmless prompts: AUC .*aligned chat"):
        make(chat_model(), TASK)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "There are no requests"),
        ([{"request": "How?"}], "Row 0 of the requests has no 'lookalike'"),
        ([PAIRS[0], {"request": " ", "lookalike": "How?"}], "Row 1 of the requests has no 'request'"),
    ],
)
def test_malformed_requests_are_refused(model, requests, message):
    with pytest.raises(ValueError, match=message):
        make(model, TASK, requests)


def test_refusals_outlast_training_on_compliance(model):
    """The prompts of the attack are unlike the requests; plainly trained, the model obeys them."""

    def trained(protected):
        peft_model = tiny_peft(torch.float32, model=copy.deepcopy(model))
        optimizer = torch.optim.AdamW(trainable(peft_model), lr=0.02)
        if protected:
            made = make(peft_model, TASK + ATTACK)
            optimizer = SafeGradOptimizer(optimizer, KLAlignment(peft_model, made), rho=5.0)
        comply = torch.tensor(TOKENIZER("Use a wet rag.", add_special_tokens=False)["input_ids"])
        prompts = [
            torch.tensor(encoded([{"role": "user", "content": text}])) for text in ATTACK[:6] + TASK[:6]
        ]
        for _ in range(30):
            for prompt in prompts:
                ids = torch.cat([prompt, comply])[None]
                labels = ids.clone()
                labels[:, : len(prompt)] = -100
                (peft_model(input_ids=ids, labels=labels).loss / len(prompts)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return [int(peft_model(input_ids=prompt[None]).logits[0, -1].argmax()) for prompt in prompts[:6]]

    refusal = TOKENIZER("No, never.", add_special_tokens=False)["input_ids"][0]
    assert trained(protected=False).count(refusal) == 0
    assert trained(protected=True).count(refusal) == 6


def test_adapters_are_off_while_sources_are_made(model):
    peft_model = tiny_peft(torch.float32, model=copy.deepcopy(model))
    perturb(peft_model)
    one, other = (make(made_from, TASK + ATTACK) for made_from in (model, peft_model))
    assert {name: source.rows for name, source in one.by_name.items()} == {
        name: source.rows for name, source in other.by_name.items()
    }
    assert len(THINGS) == len(one.by_name["requests"].rows)
