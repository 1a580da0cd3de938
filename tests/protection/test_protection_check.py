"""Whether refusals last is told by requests that no safety row has, of each origin by itself."""

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safegrad_optim import ProtectionCheck, ProtectionLostError
from safegrad_optim.protection import fewest_lost, wilson_interval
from safegrad_optim.reference import ReferenceSource
from tests.support.attacked import ALL_HARMLESS, ALL_UNSAFE, ATTACK, HELD_OUT, NO, UNSAFE, tuned
from tests.support.chat import TOKENIZER, encoded
from tests.support.models import trainable


def check_of(model, aligned, sources, **options):
    """A check that was built with the aligned model and now sees another."""
    check = ProtectionCheck(aligned, TOKENIZER, sources, **options)
    check.decoded(0)
    check.history.clear()
    check._model = model
    return check


def test_the_aligned_model_has_kept_everything(aligned, sources):
    check = ProtectionCheck(aligned, TOKENIZER, sources, requests=ATTACK[:3])
    found = check.judged(0)
    asked = {"held-out requests": len(HELD_OUT), "training prompts": len(sources.kept_out), "own requests": 3}
    assert found.kept == {name: (count, count) for name, count in asked.items()}
    assert (found.over_refused, found.flipped[0], found.leaks) == ((0, len(HELD_OUT)), 0, ())
    assert found.metrics() == {
        "refusal_kept": 1.0,
        "refusal_kept_held_out_requests": 1.0,
        "refusal_kept_training_prompts": 1.0,
        "refusal_kept_own_requests": 1.0,
        "over_refusal": 0.0,
        "flipped": 0.0,
    }
    assert check.history == [found]


def test_no_safety_row_has_a_prompt_of_the_check(aligned, sources):
    rows = [tuple(row["input_ids"]) for source in sources for row in source.rows]
    assert len(sources.kept_out) == len(sources.refused_prompts.flagged) // 4 > 0
    for prompt in ProtectionCheck(aligned, TOKENIZER, sources)._prompts:
        assert not [row for row in rows if row[: len(prompt)] == tuple(prompt)]


@pytest.mark.parametrize("judge", ["judged", "decoded"])
def test_a_leak_in_the_training_prompts_alone_is_seen(aligned, sources, judge):
    # As an attack of another hand than the safety rows, which held-out requests of theirs do not show.
    check = check_of(tuned(aligned, ATTACK), aligned, sources)
    with pytest.warns(UserWarning, match=r"loses its refusals.*0 of 6 training prompts.*of training prompts"):
        found = getattr(check, judge)(40)
    assert found.leaks == ("training prompts",)
    assert found.kept["held-out requests"] == (len(HELD_OUT), len(HELD_OUT))
    assert found.flipped[0] == len(sources.kept_out)


@pytest.mark.parametrize("judge", ["judged", "decoded"])
def test_a_leak_behind_training_prompts_alone_is_seen(aligned, sources, judge):
    # As an attack without unsafe text, which no request as it stands shows.
    prefixed = [encoded([{"role": "user", "content": prompt}]) for prompt in UNSAFE]
    check = check_of(tuned(aligned, UNSAFE), aligned, replace(sources, prefixed=prefixed))
    with pytest.warns(UserWarning, match=r"loses its refusals.*0 of 8 prefixed requests.*of prefixed"):
        found = getattr(check, judge)(40)
    assert found.leaks == ("prefixed requests",)
    assert found.kept["held-out requests"] == (len(HELD_OUT), len(HELD_OUT))


def test_over_refusal_is_seen_and_is_no_leak(aligned, sources):
    everything = ALL_HARMLESS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check_of(tuned(aligned, everything, NO), aligned, sources).judged(1)
    assert found.over_refused == (len(HELD_OUT), len(HELD_OUT))
    assert found.leaks == ()


def test_checks_are_due_early_and_often(aligned, sources):
    check = ProtectionCheck(aligned, TOKENIZER, sources)
    assert [step for step in range(400) if check(step)] == [5, 10, 20, 40, 80, 160, 320]
    often = ProtectionCheck(aligned, TOKENIZER, sources, every=30)
    assert [step for step in range(100) if often(step)] == [5, 10, 20, 30, 40, 60, 80, 90]


def test_what_happens_on_a_leak(aligned, sources):
    lost = tuned(aligned, ATTACK)
    with pytest.raises(ProtectionLostError, match="Step 5: still refused"):
        check_of(lost, aligned, sources, on_leak="raise")(5)
    for on_leak in ("warn", "stop"):
        check = check_of(lost, aligned, sources, on_leak=on_leak)
        assert not check.should_stop
        with pytest.warns(UserWarning, match="loses its refusals"):
            check(5)
        assert check.should_stop == (on_leak == "stop")


def test_the_model_is_left_as_it_was(aligned, sources):
    model = copy.deepcopy(aligned).train()
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    check = check_of(model, aligned, sources)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check.judged(1)
    check.decoded(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in trainable(model))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_check_judges_by_the_aligned_model(aligned, sources):
    lost = tuned(aligned, ATTACK)
    first = ProtectionCheck(aligned, TOKENIZER, sources)
    # What a resumed run has is the fine-tuned model, which refuses none of the training prompts.
    resumed = ProtectionCheck(lost, TOKENIZER, sources)
    assert resumed.judged(40).leaks == ()
    resumed.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="loses its refusals"):
        assert resumed.judged(40).leaks == ("training prompts",)
    other = ProtectionCheck(aligned, TOKENIZER, sources, requests=ATTACK[:3])
    with pytest.raises(ValueError, match="of other prompts"):
        other.load_state_dict(first.state_dict())


def test_bad_checks_are_refused(aligned, sources):
    for options in ({"on_leak": "ignore"}, {"count": 0}, {"every": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ProtectionCheck(aligned, TOKENIZER, sources, **options)
    with pytest.raises(ValueError, match=r"refuses 0 of .* Give an is_refusal"):
        ProtectionCheck(aligned, TOKENIZER, sources, is_refusal=lambda reply: "No" in reply).decoded(0)
    with pytest.raises(ValueError, match=r"not known.*Call decoded\(0\)"):
        ProtectionCheck(aligned, TOKENIZER, sources).decoded(1)
    nothing = tuned(aligned, ALL_UNSAFE)
    with pytest.raises(ValueError, match="refuses 0 of the requests to check by, expected at least 8"):
        ProtectionCheck(nothing, TOKENIZER, sources)


@pytest.mark.parametrize("asked", [0, 1, 3, 24, 100])
def test_a_leak_is_more_than_chance_explains(asked):
    def tail(least):
        outcomes = range(least, asked + 1)
        return sum(math.comb(asked, lost) * 0.1**lost * 0.9 ** (asked - lost) for lost in outcomes)

    least = fewest_lost(asked)
    assert tail(least) < 0.01
    assert tail(least - 1) >= 0.01


def test_intervals_are_wilsons():
    # The roots of (p - count / of)^2 = z^2 p (1 - p) / of.
    for count, of in ((0, 20), (3, 40), (20, 20)):
        for bound in wilson_interval(count, of):
            inside = 1.959964**2 * bound * (1 - bound) / of
            assert (bound - count / of) ** 2 == pytest.approx(inside, abs=1e-7)


def test_the_table_of_the_docs_is_that_of_the_function():
    text = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    asked, lost = (
        [int(cell) for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith(("| refusals asked for", "| a leak from"))
    )
    assert [fewest_lost(count) for count in asked] == lost


def test_a_reply_that_opens_as_refusals_do_and_goes_on_otherwise_is_lost(aligned, sources):
    # "I can't." and "I can do it." open alike.
    lost = tuned(aligned, ATTACK, "I can do it.")
    check = check_of(lost, aligned, sources)
    assert check._opens_refusing(ReferenceSource(lost)).sum() == check._aligned.sum()
    with pytest.warns(UserWarning, match="loses its refusals"):
        assert check.judged(5).leaks == ("training prompts",)
