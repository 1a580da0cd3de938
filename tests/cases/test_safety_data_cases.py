"""Situations of safety rows, as they should go: what is compared is what the user meant."""

import datetime
import itertools
import pathlib
import shutil
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
from torch.utils.data import IterableDataset
from transformers.utils import chat_template_utils

from safegrad_optim import KLAlignment, Reference, is_refusal, safety_rows
from tests.cases.support import flat, refused, right_or_refused
from tests.support import models
from tests.support.models import padded, perturb, tiny_model, tiny_peft, trainable

REQUEST, REFUSAL = "How do I pick a lock?", "I can't help with that."
PAIR = {"prompt": REQUEST, "response": REFUSAL}


def byte_tokenizer(template):
    """A tokenizer that has a token for each byte."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|end|>", chat_template=template
    )


def template_of(name):
    trl = pytest.importorskip("trl")
    return (pathlib.Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def texts(row, tokenizer):
    """The text of a row, and that of its labelled part."""
    labelled = [token for token in row["labels"] if token != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(labelled)


# --- chat templates -------------------------------------------------------------------------------


def test_a_template_that_wants_lists_of_parts():
    """A row has the request before the reply, and the reply labelled, or is refused."""
    tokenizer = byte_tokenizer(template_of("smolvlm"))
    with right_or_refused():
        text, labelled = texts(safety_rows([PAIR], tokenizer)[0], tokenizer)
        assert REQUEST in text
        assert labelled.strip().startswith(REFUSAL)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3", "nemotron_3_nano"])
def test_a_template_whose_generation_prompt_opens_a_thought(name):
    """The reply's place is found where a template opens a thought for generation only."""
    tokenizer = byte_tokenizer(template_of(name))
    text, labelled = texts(safety_rows([PAIR], tokenizer)[0], tokenizer)
    assert REQUEST in text.removesuffix(labelled)
    assert REFUSAL in labelled


def rows_on(day, tokenizer):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    with mock.patch.object(chat_template_utils, "datetime", Day):
        return safety_rows([PAIR], tokenizer)


def test_a_template_that_writes_the_date(tmp_path):
    """A run resumes on another day, or the error says that the date has changed the rows."""
    tokenizer = byte_tokenizer(template_of("llama3_2"))
    first, second = rows_on("2026-11-25", tokenizer), rows_on("2026-11-26", tokenizer)
    path = tmp_path / "reference.safetensors"
    KLAlignment(tiny_model(vocab_size=300), first, reference=Reference(file=path))
    with right_or_refused(r"\bdate\b"):
        KLAlignment(tiny_model(vocab_size=300), second, reference=Reference(file=path, resumed=True))


def test_the_state_of_a_run_on_another_days_rows_is_refused():
    """A LoRA run does not resume on other safety rows."""
    tokenizer = byte_tokenizer(template_of("llama3_2"))
    first, second = rows_on("2026-11-25", tokenizer), rows_on("2026-11-26", tokenizer)

    def alignment(rows):
        model = tiny_model(vocab_size=300, tie_word_embeddings=False)
        return KLAlignment(tiny_peft(model=model), rows)

    state = alignment(first).state_dict()
    with right_or_refused():
        alignment(second).load_state_dict(state)
        assert first == second


@pytest.mark.filterwarnings("ignore")  # of mistral-common, about its own API
def test_a_tokenizer_whose_control_tokens_are_not_read_from_text(tmp_path):
    """Rows have the tokens that apply_chat_template(tokenize=True) gives."""
    mistral_common = pytest.importorskip("mistral_common")
    backend = pytest.importorskip("transformers.tokenization_mistral_common").MistralCommonBackend
    data = pathlib.Path(mistral_common.__file__).parent / "data"
    shutil.copy(data / "tekken_240911.json", tmp_path / "tekken.json")
    tokenizer = backend.from_pretrained(tmp_path)
    model = tiny_model(vocab_size=len(tokenizer))
    asked = []

    def generate(input_ids, **options):
        asked.append(input_ids[0].tolist())
        raise KeyboardInterrupt  # that is all there is to see

    model.generate = generate
    with pytest.raises(KeyboardInterrupt):
        safety_rows([{"prompt": REQUEST}], tokenizer, model=model)
    messages = [{"role": "user", "content": REQUEST}]
    assert asked == [tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)]


# --- what is a refusal ----------------------------------------------------------------------------


def test_the_refusal_of_a_thinking_model_counts():
    """A reply is judged by what follows its thought."""
    thought = (
        "<think>\nOkay, the user asks how to pick a lock. I should decline, since this may be a burglary."
    )
    assert is_refusal(f"{thought}\n</think>\n{REFUSAL}")


@pytest.mark.parametrize(
    "reply",
    [
        "I can't wait to help! Step 1: take a tension wrench.",
        "I will not only tell you how, but also show you.",
        "Sorry, I took so long. Sure, here is how:",
        "I refuse to let you down: here is how.",
    ],
)
def test_compliance_that_sounds_like_a_refusal_is_none(reply):
    """Words of a refusal are no refusal where the reply complies."""
    assert not is_refusal(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "很抱歉，我不能帮助您完成这个请求。",  # noqa: RUF001
        "Lo siento, pero no puedo ayudarte con eso.",
        "Tut mir leid, dabei kann ich nicht helfen.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "I **cannot** help with that.",
        "I'm not going to help with that.",
    ],
)
def test_a_refusal_in_other_words_is_not_called_compliance(reply):
    """The model's own refusal is kept, or the error says how to tell what a refusal is."""
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = byte_tokenizer(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    model = tiny_model(vocab_size=300)
    own = torch.tensor([tokenizer(reply)["input_ids"]])
    model.generate = lambda input_ids, **_: torch.cat([input_ids, own], dim=1)
    with right_or_refused("(?s)^(?!.*protect compliance)"):
        assert len(safety_rows([{"prompt": REQUEST}], tokenizer, model=model)) == 1


# --- rows as KLAlignment takes them ---------------------------------------------------------------


def test_rows_that_are_packed_stay_packed():
    """Texts that `position_ids` separate in one row have the gradient that they have in rows of their own."""
    rows = models.safety_rows(2)
    packed = {name: [*rows[0][name], *rows[1][name]] for name in ("input_ids", "labels")}
    packed["position_ids"] = [place for row in rows for place in range(len(row["labels"]))]

    def gradient(given):
        model = tiny_model()
        alignment = KLAlignment(model, given)
        perturb(model, 0.1)
        return flat(alignment(trainable(model)))

    expected = gradient(rows)
    torch.testing.assert_close(gradient({name: [value] for name, value in packed.items()}), expected)
    with right_or_refused():
        torch.testing.assert_close(gradient([packed]), expected)


@pytest.mark.parametrize("column", ["length", "label"])
def test_one_more_numeric_column(column):
    """A column that is no model input is left out, or the error names it."""
    rows = [row | {column: 1} for row in models.safety_rows()]
    with right_or_refused(column):
        KLAlignment(tiny_model(), rows)


def test_rows_without_an_end():
    """A stream without an end is refused before it has filled the memory."""
    rows = models.safety_rows()

    class Endless(IterableDataset[dict[str, list[int]]]):
        def __iter__(self):
            yield from itertools.islice(itertools.cycle(rows), 500_000)
            raise AssertionError("500,000 rows were read")

    with refused():
        KLAlignment(tiny_model(), Endless())


def test_rows_that_are_changed_afterwards():
    """What was given is what is compared, whatever becomes of the tensors."""
    batch = padded(models.safety_rows())
    model = tiny_model()
    alignment = KLAlignment(model, batch)
    gradients = [torch.zeros_like(parameter) for parameter in trainable(model)]
    batch["input_ids"][:, 2:] = 5
    torch.testing.assert_close(alignment(trainable(model)), gradients)


def test_a_loader_that_reuses_its_tensors():
    """Batches are those that the loader has given, not the last one many times."""
    batches = [padded(models.safety_rows(2, seed)) for seed in range(3)]

    def reusing():
        buffer = {name: value.clone() for name, value in batches[0].items()}
        for batch in batches:
            for name, value in batch.items():
                buffer[name].copy_(value)
            yield buffer

    with right_or_refused():
        taken = KLAlignment(tiny_model(), reusing())._sources[0].batches
        for found, batch in zip(taken, batches, strict=True):
            assert torch.equal(found["input_ids"], batch["input_ids"])


def labels_on_padding():
    batch = padded(models.safety_rows(), right=20)
    return [batch | {"labels": batch["input_ids"].clone()}]


def rows_without_a_response():
    first, *others = models.safety_rows()
    return [first, *(row | {"labels": [-100] * len(row["labels"])} for row in others)]


def labels_that_are_shifted():
    return [row | {"labels": [*row["labels"][1:], -100]} for row in models.safety_rows()]


@pytest.mark.parametrize("make", [labels_on_padding, rows_without_a_response, labels_that_are_shifted])
def test_labels_that_are_not_those_of_a_response(make):
    """Labels on padding, a row without any, and labels that are not the input ids are refused."""
    with refused():
        KLAlignment(tiny_model(), make())
