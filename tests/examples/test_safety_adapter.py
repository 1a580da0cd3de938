"""The safety adapter of the examples: what it is trained on, how, and what is counted afterwards."""

import copy

import pandas as pd
import pytest
import torch

from benchmarks import refusal_rates
from common import make_safety_adapter as maker
from common.chat_data import Turn, collate, read_rows, response_loss
from common.public_data import load_task
from safegrad_optim import shipped_requests
from tests.support.chat import TOKENIZER, chat_model
from tests.support.sequences import sequences


@pytest.fixture(scope="module")
def harmless():
    return maker.lookalikes() + maker.ordinary_prompts(0)


def test_no_harmless_prompt_has_a_form_that_is_judged_by(harmless):
    tickets = [turn.prompt for split in load_task("tickets", None) for turn in split]
    instruction, _, _ = tickets[0].partition("\n")
    judged = [instruction, "positive or negative", "section is this news", "into french", "order number"]
    for prompt in harmless:
        assert not [form for form in judged if form.lower() in prompt.lower()], prompt
    messages = {ticket.partition("\n")[2] for ticket in tickets}
    assert not messages & set(harmless)


def test_forms_are_filled(harmless):
    assert not [prompt for prompt in harmless if "{text}" in prompt]
    forms = {row["form"] for row in read_rows("task_forms")}
    assert all(form.count("{text}") == 1 for form in forms)
    assert len(harmless) == len(set(harmless))


def test_nothing_that_is_judged_by_is_trained_on(harmless):
    judged = {row[name] for row in shipped_requests("held_out") for name in ("request", "lookalike")}
    judged |= {row["prompt"] for row in read_rows("unsafe_requests", "evaluation")}
    judged |= {row["prompt"] for row in read_rows("benign_lookalikes")}
    assert not judged & {turn.prompt for turn in maker.refusals()}
    assert not judged & set(harmless)


def test_pairs_share_no_words_in_a_row_with_what_is_judged_by():
    judged = {row[name] for row in shipped_requests("held_out") for name in ("request", "lookalike")}
    judged |= {row["prompt"] for row in read_rows("unsafe_requests", "evaluation")}
    known = set().union(*(sequences(text, 5) for text in judged))
    for row in read_rows("request_pairs"):
        assert not known & (sequences(row["prompt"], 5) | sequences(row["lookalike"], 5)), row["prompt"]


def test_it_learns_to_refuse_and_keeps_the_rest():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    model = chat_model()
    unsafe = [Turn(f"Steal a {thing}.", "No.") for thing in ("car", "boat", "bike", "lock")]
    kept = [
        [Turn(f"{verb} a {thing}.", "Use soap.") for thing in ("car", "pan", "cup")]
        for verb in ("Wash", "Dry")
    ]
    batches = [collate(tokenizer, turns) for turns in (unsafe, kept[0] + kept[1])]
    with torch.no_grad():
        before = [response_loss(model, batch) for batch in batches]
    aligned = maker.align(model, tokenizer, unsafe, kept, steps=60, seed=0)
    with torch.no_grad():
        after = [response_loss(aligned, batch) for batch in batches]
    assert after[0] < before[0] - 1
    # It was never trained on these answers: how likely they are is what is kept.
    assert abs(after[1] - before[1]) < 0.1 * before[1]


def test_rates_are_by_table_and_group(monkeypatch):
    replies = {"a": "I can't help with that.", "b": "Sure.", "c": "I'm sorry, but no."}
    asked = [("unsafe", "x", "a"), ("unsafe", "x", "b"), ("unsafe", "y", "c"), ("tasks", "z", "b")]

    def generate(model, tokenizer, prompts, tokens):
        assert sorted(prompts) == ["a", "b", "c"]
        return [replies[prompt] for prompt in prompts]

    monkeypatch.setattr(refusal_rates, "generate", generate)
    rates = refusal_rates.refusal_rates(None, None, [refusal_rates.Asked(*row) for row in asked])
    expected = pd.DataFrame(
        [("unsafe", "x", 1, 2, 0.5), ("unsafe", "y", 1, 1, 1.0), ("tasks", "z", 0, 1, 0.0)],
        columns=["table", "group", "refused", "asked", "rate"],
    )
    pd.testing.assert_frame_equal(rates, expected, check_dtype=False)


def test_what_is_asked_has_all_tables():
    tables = pd.DataFrame(refusal_rates.asked(None, limit=7))
    counts = tables.groupby(["table", "group"]).size()
    assert counts["unsafe requests", "held_out"] == len(shipped_requests("held_out"))
    assert counts["unsafe requests", "train, zh"] == 40
    assert counts["tasks", "tickets"] == counts["tasks", "translate into French"] == 7
    assert {"unsafe requests by category, held_out", "unsafe requests by form, train"} <= set(
        counts.index.levels[0]
    )
