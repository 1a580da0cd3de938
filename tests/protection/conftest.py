from dataclasses import replace

import pytest

from safegrad_optim import safety_sources
from safegrad_optim.protection import _check
from tests.support.attacked import ATTACK, HELD_OUT, PAIRS, TASK, aligned_model
from tests.support.chat import TOKENIZER


@pytest.fixture(scope="package")
def aligned():
    return aligned_model()


@pytest.fixture(scope="package")
def sources(aligned):
    made = safety_sources(aligned, TOKENIZER, TASK + ATTACK, requests=PAIRS)
    # Such a small model refuses some of these and others not: tests that want some give their own.
    return replace(made, prefixed=[])


@pytest.fixture(autouse=True)
def held_out(monkeypatch):
    monkeypatch.setattr(_check, "shipped_requests", lambda split: {"held_out": HELD_OUT}[split])
