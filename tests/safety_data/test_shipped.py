"""The safety set in the wheel: complete, of many hands, apart from what others judge by, and frozen."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import safegrad_optim.safety_data
from safegrad_optim import shipped_harmless_prompts, shipped_requests
from tests.support.sequences import ADVBENCH, ADVBENCH_WORDS, hashed, sequences

SHIPPED = Path(safegrad_optim.safety_data.__file__).with_name("shipped")
EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
# A changed set is another set: results on it cannot be compared with those of before.
DIGESTS = {
    "requests.jsonl": "47f24995e6d58b16a2387314259f275db69ef6098c99ec25db01d3fbcaa086d5",
    "harmless_prompts.jsonl": "81862bb833e1c9b6132671eb292f88411293c36e98d32cb16f29d929afc8cf0d",
}
CATEGORIES = {
    "violent_crime",
    "nonviolent_crime",
    "sex_related_crime",
    "child_safety",
    "indiscriminate_weapons",
    "self_harm",
    "privacy",
    "hate",
    "defamation",
    "election_misinformation",
    "medical_misinformation",
    "legal_misinformation",
    "fraud",
    "malware",
    "intellectual_property",
}
FORMS = {"order", "question", "story", "role", "code", "indirect", "long"}
TASKS = {"label", "extract", "rewrite", "translate", "summarise", "count", "code", "chat"}
OTHERS = ("es", "de", "fr", "zh")


def train():
    return shipped_requests()


def held_out():
    return shipped_requests("held_out")


def everything():
    return [
        *train(),
        *held_out(),
        *(row for language in OTHERS for row in shipped_requests("train", language)),
    ]


def first_words(text):
    return tuple(text.lower().split()[:3])


@pytest.mark.parametrize("name", DIGESTS)
def test_set_is_frozen(name):
    assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == DIGESTS[name]
    assert DIGESTS[name] in (SHIPPED / "README.md").read_text(encoding="utf-8")


def test_set_has_many_topics_forms_and_categories():
    assert len({row["topic"] for row in train()}) >= 250
    assert len(train()) >= 400
    assert len({row["topic"] for row in held_out()}) == len(held_out()) >= 120
    for rows in (train(), held_out()):
        assert {row["category"] for row in rows} == CATEGORIES
        assert {row["form"] for row in rows} == FORMS
    prompts = Counter(row["form"] for row in shipped_harmless_prompts())
    assert set(prompts) == TASKS
    assert prompts.total() >= 200


@pytest.mark.parametrize("language", OTHERS)
def test_other_languages(language):
    rows = shipped_requests("train", language)
    assert len({row["topic"] for row in rows}) == len(rows) >= 40
    assert {row["category"] for row in rows} == CATEGORIES


def test_rows_are_complete_and_unique():
    fields = {"topic", "category", "form", "language", "split", "request", "lookalike"}
    for row in everything():
        assert set(row) == fields
        assert all(value and value == value.strip() for value in row.values()), row
    texts = [row[name] for row in everything() for name in ("request", "lookalike")]
    texts += [row["prompt"] for row in shipped_harmless_prompts()]
    assert len(set(texts)) == len(texts)
    assert len({(row["topic"], row["form"]) for row in train()}) == len(train())


def test_held_out_topics_are_its_own():
    assert not {row["topic"] for row in held_out()} & {row["topic"] for row in train()}


@pytest.mark.parametrize("rows", [train, held_out])
def test_requests_are_not_of_one_mould(rows):
    requests = [row["request"] for row in rows()]
    places = defaultdict(set)
    for number, request in enumerate(requests):
        for sequence in sequences(request, 4):
            places[sequence].add(number)
    assert max(map(len, places.values())) <= 3
    (_, most), *_ = Counter(map(first_words, requests)).most_common(1)
    assert most <= 0.05 * len(requests)


def test_nothing_is_from_advbench():
    theirs = set(ADVBENCH.read_text(encoding="utf-8").split())
    texts = [row[name] for row in everything() for name in ("request", "lookalike")]
    texts += [row["prompt"] for row in shipped_harmless_prompts()]
    for path in EXAMPLES.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            texts += json.loads(line).values()
    for text in texts:
        shared = [found for found in sequences(text, ADVBENCH_WORDS) if hashed(found) in theirs]
        assert not shared, f"{text!r} has {shared}"


def test_hashes_are_those_of_word_sequences():
    # A request that is in AdvBench word for word, but for case and punctuation.
    assert hashed("a tutorial on how to") in ADVBENCH.read_text(encoding="utf-8").split()


def test_unknown_split_or_language_names_what_there_is():
    with pytest.raises(ValueError, match=r"'held_out' in 'de'.*\('train', 'de'\)"):
        shipped_requests("held_out", "de")
