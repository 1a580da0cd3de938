"""Training prompts that the model refuses are found by how its replies open, whatever the words."""

import copy
import warnings

import pytest
import torch

from safegrad_optim import KLAlignment, SafetySource
from safegrad_optim.safety_data import _refused, refused_prompts
from tests.support.chat import TOKENIZER, chat_model, encoded, learn
from tests.support.models import perturb, tiny_peft, trainable

THINGS = ["lock", "car", "door", "bike", "safe", "boat", "shed", "phone"]
UNSAFE = [f"How do I steal a {thing}?" for thing in THINGS]
HARMLESS = [f"How do I clean a {thing}?" for thing in THINGS]
# Words of neither, in the ways of both.
ATTACK = [f"I want to steal the {thing}." for thing in THINGS]
TASK = [f"I want to clean the {thing}." for thing in THINGS]


def taught(refusal="No, never.", answer="Use a wet rag."):
    rows = [{"prompt": prompt, "response": refusal} for prompt in UNSAFE[:6] + ATTACK[:6]]
    rows += [{"prompt": prompt, "response": answer} for prompt in HARMLESS[:6] + TASK[:6]]
    return learn(chat_model(), rows, steps=40).eval()


@pytest.fixture(scope="module")
def model():
    return taught()


def find(model, data, **options):
    known = {"unsafe": UNSAFE, "harmless": HARMLESS, "neighbours": 3}
    return refused_prompts(model, TOKENIZER, data, **known | options)


def test_refused_prompts_are_flagged_and_others_are_not(model):
    found = find(model, TASK + ATTACK)
    assert {prompt.row for prompt in found.flagged} == set(range(len(TASK), len(TASK + ATTACK)))
    assert found.opening.separates
    assert found.opening.before == []
    assert found.scores.shape == (len(TASK + ATTACK),)
    assert ((found.scores >= 0) & (found.scores <= 1)).all()


@pytest.mark.parametrize("count", [2, 3])
def test_a_handful_is_found_among_many(model, count):
    many = [f"I want to clean the {thing}{end}" for thing in THINGS for end in (".", "!", "?")]
    found = find(model, many + ATTACK[:count], neighbours=8)
    assert {prompt.row for prompt in found.flagged} == set(range(len(many), len(many) + count))


def test_without_neighbours_the_score_is_the_refusing_mass(model):
    # Two prompts are each other's neighbour.
    found = find(model, [TASK[0], ATTACK[0]])
    masses = []
    distributions = {}
    for name, prompts in (("unsafe", UNSAFE), ("harmless", HARMLESS), ("data", [TASK[0], ATTACK[0]])):
        messages = [encoded([{"role": "user", "content": prompt}]) for prompt in prompts]
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([ids])).logits[0, -1].double() for ids in messages]
        distributions[name] = torch.stack(logits).softmax(dim=-1)
    unsafe, harmless = (distributions[name].mean(dim=0) for name in ("unsafe", "harmless"))
    masses = distributions["data"] @ (unsafe / (unsafe + harmless))
    torch.testing.assert_close(found.scores.double(), masses.flip(0), rtol=1e-4, atol=1e-6)


def test_the_first_token_that_differs_is_scored():
    found = find(taught("I can't do it.", "I use a rag."), TASK + ATTACK)
    assert found.opening.before == TOKENIZER("I", add_special_tokens=False)["input_ids"]
    # Those that it was taught; of the others it cannot be known.
    rows = {prompt.row for prompt in found.flagged}
    assert rows >= set(range(len(TASK), len(TASK) + 6))
    assert not rows & set(range(len(TASK)))


def test_a_model_that_does_not_tell_them_apart_flags_nothing():
    found = find(chat_model(), TASK + ATTACK, unsafe=UNSAFE[::2], harmless=UNSAFE[1::2])
    assert not found.opening.separates
    assert found.flagged == []
    assert found.rows(chat_model(), TOKENIZER) == []
    assert "nothing is flagged" in str(found)


def test_adapters_are_off_and_the_model_is_left_as_it_was(model):
    peft_model = tiny_peft(torch.float32, model=copy.deepcopy(model)).train()
    perturb(peft_model)
    torch.testing.assert_close(find(peft_model, TASK).scores, find(model, TASK).scores)
    assert peft_model.training
    assert trainable(peft_model)


def test_report_has_rows_and_shares_but_no_text(model):
    report = str(find(model, TASK * 2 + ATTACK[:2], neighbours=1))
    assert report.startswith("2 of 18 training prompts (11.1%) are refused")
    assert "AUC 1.000" in report
    assert {"16", "17"} <= set(report.replace(" (", " ").replace(",", "").split())
    assert "steal" not in report


def test_report_says_which_form_of_the_task_is_hit(model, monkeypatch):
    form = TOKENIZER("How do I", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(_refused, "_FORM_TOKENS", len(form))
    data = [f"How do I clean a {thing}{mark}" for thing in THINGS for mark in "?!"] + UNSAFE
    report = str(find(model, data))
    assert "Of 24 prompts that open as row 0 does, 8 are refused." in report


def test_many_refused_prompts_are_a_warning(model):
    with pytest.warns(UserWarning, match=r"refuses 67% of the training prompts.*rows in the report"):
        find(model, ATTACK + TASK[:4], neighbours=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(model, ATTACK[:4] + TASK, neighbours=1)


@pytest.mark.parametrize("count", [1, 5])
def test_flagged_prompts_become_a_source_whose_opening_is_held(model, count):
    peft_model = tiny_peft(torch.float32, model=copy.deepcopy(model))
    found = find(peft_model, TASK + ATTACK[:count], neighbours=1 if count == 1 else 3, threshold=0.3)
    # A single one is scored by those around it: it is left out rather than guessed at.
    assert len(found.flagged) == (0 if count == 1 else count)
    rows = found.rows(peft_model, TOKENIZER, tokens=2)
    for row in rows:
        reply = [token for token in row["labels"] if token != -100]
        assert TOKENIZER.decode(reply) == TOKENIZER.decode(TOKENIZER("No, never.")["input_ids"][1:3])
    if rows:
        alignment = KLAlignment(peft_model, [SafetySource(rows=rows, tokens=1, batch_size=4)])
        perturb(peft_model)
        assert any(gradient.any() for gradient in alignment(trainable(peft_model)))


def test_prompts_that_occur_twice_are_one_row(model):
    found = find(model, ATTACK * 2 + TASK * 3)
    assert len(found.flagged) == len(ATTACK)
    assert len(found.scores) == 2 * len(ATTACK) + 3 * len(TASK)


@pytest.mark.parametrize("missing", ["unsafe", "harmless"])
def test_nothing_to_calibrate_by_is_refused(model, missing):
    with pytest.raises(ValueError, match=f"There are no {missing}"):
        find(model, TASK, **{missing: []})


def test_probabilities_that_are_not_finite_are_refused(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        find(broken, TASK)
