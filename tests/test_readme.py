"""The snippet of the README does what the README says."""

import warnings
from pathlib import Path

import pytest
import torch

from safegrad_optim import ProtectionCheck, safety_rows, safety_sources
from safegrad_optim.protection import _check
from safegrad_optim.safety_data import _sources
from tests.support.attacked import ATTACK, HELD_OUT, PAIRS, TASK, YES, aligned_model, turns
from tests.support.chat import TOKENIZER
from tests.support.models import padded

README = Path(__file__).parent.parent / "README.md"


def snippet(with_safegrad):
    """The code of the README, with or without what this library adds to a training script."""
    block = README.read_text(encoding="utf-8").partition("```diff\n")[2].partition("```")[0]
    return "\n".join(line[1:] for line in block.splitlines() if with_safegrad or not line.startswith("+"))


@pytest.mark.parametrize("with_safegrad", [True, False])
def test_the_snippet_keeps_the_refusals_that_a_plain_run_loses(with_safegrad, monkeypatch):
    # The tiny model refuses requests of its own.
    monkeypatch.setattr(
        _sources, "shipped_requests", lambda split="train": PAIRS if split == "train" else HELD_OUT
    )
    monkeypatch.setattr(_sources, "shipped_harmless_prompts", list)
    monkeypatch.setattr(_check, "shipped_requests", lambda split: HELD_OUT)
    model = aligned_model()
    rows = turns(TASK + ATTACK, YES)
    check = ProtectionCheck(model, TOKENIZER, safety_sources(model, TOKENIZER, rows))
    tokenised = safety_rows(rows, TOKENIZER)
    given = {
        "model": model,
        "tokenizer": TOKENIZER,
        "train_dataset": rows,
        "loader": [padded(tokenised[start::8]) for start in range(8)] * 10,
        # A model of its size wants larger steps.
        "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr=20 * lr),
    }
    exec(snippet(with_safegrad), given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check.judged(80)
    now, of = found.kept["training prompts"]
    assert (now == of) if with_safegrad else (now == 0)
    assert bool(found.leaks) != with_safegrad
