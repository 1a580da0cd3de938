import json
import subprocess
import sys
import warnings

import datasets
import jinja2
import pytest
import torch

from safegrad_optim import KLAlignment, is_refusal, safety_rows
from safegrad_optim.reference import ReferenceSource
from safegrad_optim.safety_data import openings
from tests.support.chat import (
    BRIEF,
    CHATML,
    COMPLIANT,
    LONGER,
    PAIR,
    PROMPT,
    REFUSAL,
    REQUEST,
    TOKENIZER,
    chat_model,
    encoded,
    learn,
    tokenizer,
)
from tests.support.models import perturb, tiny_peft


@pytest.fixture(scope="module")
def aligned_weights():
    """Weights of a model that refuses two requests and complies with two."""
    return learn(chat_model(), [PAIR, COMPLIANT, LONGER, BRIEF]).state_dict()


@pytest.fixture
def aligned(aligned_weights):
    model = chat_model(seed=1)
    model.load_state_dict(aligned_weights)
    return model


def labelled(row, tokenizer=TOKENIZER):
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def only(data, tokenizer=TOKENIZER, **options):
    (row,) = safety_rows(data, tokenizer, **options)
    return row


def user(text=REQUEST):
    return {"role": "user", "content": text}


def assistant(text=REFUSAL):
    return {"role": "assistant", "content": text}


def write(path, *lines):
    path.write_bytes(b"\n".join(line.encode() for line in lines))
    return path


# Rows whose replies are given.


def test_the_reply_is_labelled_through_its_end_of_turn():
    row = only([PAIR])
    assert TOKENIZER.decode(row["input_ids"]) == f"{PROMPT}{REFUSAL}<|im_end|>"
    assert labelled(row) == f"{REFUSAL}<|im_end|>"
    prompt = row["labels"].count(-100)
    assert row["labels"] == [-100] * prompt + row["input_ids"][prompt:]
    assert TOKENIZER.decode(row["input_ids"][:prompt]) == PROMPT
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    # The template has written <s> itself, once.
    assert row["input_ids"].count(TOKENIZER.bos_token_id) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user(), assistant()]},
        {"prompt": REQUEST, "completion": REFUSAL},
        {"prompt": [user()], "completion": [assistant()]},
        {"prompt": [user()], "response": REFUSAL},
        {"prompt": [user(), assistant()]},
        {"messages": None, "completion": None, **PAIR, "category": "crime"},
    ],
)
def test_every_format_gives_the_same_row(row):
    assert only([row]) == only([PAIR])


def test_a_conversation_keeps_its_turns_and_only_the_last_reply_is_labelled():
    system = {"role": "system", "content": "Be brief."}
    row = only([{"messages": [system, user("Hello"), assistant("Hi"), user(), assistant()]}])
    assert TOKENIZER.decode(row["input_ids"]) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        f"<|im_start|>assistant\nHi<|im_end|>\n{PROMPT.removeprefix('<s>')}{REFUSAL}<|im_end|>"
    )
    assert labelled(row) == f"{REFUSAL}<|im_end|>"


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("", f"{REFUSAL}<|im_end|>"),
        ("{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}", f"{REFUSAL}<|im_end|>"),
        ("{% if not add_generation_prompt %}{{ ' \n\n' }}{% endif %}", f"{REFUSAL}<|im_end|>"),
        ("{% if not add_generation_prompt %}{{ '### END' }}{% endif %}", f"{REFUSAL}<|im_end|>\n### END"),
    ],
)
def test_what_a_template_writes_after_the_end_of_turn_is_not_labelled(ending, expected):
    other = tokenizer(CHATML + ending)
    assert labelled(only([PAIR], other), other) == expected


def test_the_end_of_turn_may_be_another_special_token_than_eos_or_none():
    other = tokenizer(CHATML.replace("im_end", "endoftext"))
    assert labelled(only([PAIR], other), other) == f"{REFUSAL}<|endoftext|>"
    plain = tokenizer("{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}")
    assert labelled(only([PAIR], plain), plain) == f"{REFUSAL}\n"


def test_lists_datasets_and_files_give_the_same_rows(tmp_path):
    data = [PAIR, LONGER, COMPLIANT]
    expected = safety_rows(data, TOKENIZER)
    lines = [json.dumps(row) for row in data]
    path = write(tmp_path / "rows.jsonl", "\ufeff" + lines[0], "", *lines[1:], "")
    for given in (datasets.Dataset.from_list(data), iter(data), path, str(path)):
        assert safety_rows(given, TOKENIZER) == expected


def test_alignment_takes_the_rows():
    rows = safety_rows([PAIR, LONGER], TOKENIZER)
    alignment = KLAlignment(tiny_peft(model=chat_model()), rows)
    (batch,) = alignment._sources[0].batches
    assert [labelled({"labels": labels}) for labels in batch["labels"].tolist()] == [
        f"{REFUSAL}<|im_end|>",
        f"{LONGER['response']}<|im_end|>",
    ]


def test_long_replies_are_cut_at_the_right_and_never_away():
    whole = only([PAIR])
    prompt = whole["labels"].count(-100)
    assert only([PAIR], max_length=len(whole["labels"])) == whole
    cut = only([PAIR], max_length=prompt + 1)
    assert cut == {name: values[: prompt + 1] for name, values in whole.items()}
    assert cut["labels"][-1] != -100
    with pytest.raises(
        ValueError, match=rf"row 1: its prompt has {prompt} tokens and max_length is {prompt}"
    ):
        safety_rows([{"prompt": "a", "response": "b"}, PAIR], TOKENIZER, max_length=prompt)
    with pytest.raises(ValueError, match="row 0: its prompt has"):
        safety_rows([REQUEST], TOKENIZER, max_length=prompt)


# What is refused.


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "row 1 is a int, expected a text or a mapping with 'messages', or 'prompt'"),
        ([user(), assistant()], "row 1 is a list, expected a text or a mapping"),
        ({"question": "a", "answer": "b"}, r"row 1 has the fields \['answer', 'question'\], expected"),
        ({"response": "b"}, r"row 1 has the fields \['response'\]"),
        ({**PAIR, "completion": "b"}, "row 1 has the fields"),
        ({**PAIR, "messages": [user(), assistant()]}, "row 1 has the fields"),
        ({"prompt": 7, "response": "b"}, "row 1: 'prompt' is no text or list of messages"),
        ({"messages": ["Hello"]}, "row 1: 'messages' is no text or list of messages.*found \"\\['Hello"),
        ({"messages": [{"role": "user"}]}, "row 1: 'messages' is no text or list of messages"),
        ({"messages": [user(), assistant(["a"])]}, "row 1: 'messages' is no text or list of messages"),
        ({"messages": []}, r"row 1: its messages have the roles \[\]"),
        ({"messages": [assistant()]}, r"roles \['assistant'\], expected a message to reply to"),
        (
            {"messages": [user(), {"role": "tool", "content": "a"}]},
            "'tool'.*and user or assistant as the last",
        ),
        ({"prompt": [user()], "completion": [user()]}, "and assistant as the last"),
        ({"prompt": "a", "response": " \n"}, "row 1: its response is empty"),
        ({"messages": [user(), assistant("")]}, "row 1: its response is empty"),
        ("", "row 1: its request is empty"),
        ({"prompt": "a"}, r"1 of 2 safety rows have no response \(first: Safety row 1\).*model="),
        ({"prompt": "a", "response": "\n\nNo."}, "row 1: .* does not start with the tokens of its prompt"),
    ],
)
def test_malformed_rows_are_refused_by_number(row, message):
    with pytest.raises(ValueError, match=message):
        safety_rows([PAIR, row], TOKENIZER)


def test_a_template_that_writes_the_prompt_differently_with_a_reply_is_refused():
    other = tokenizer(CHATML.replace("assistant\n' }}{% endif %}", "assistant\nHm,' }}{% endif %}"))
    with pytest.raises(ValueError, match=r"row 0: .*Expected '.*Hm,' before it, found .*I can'"):
        safety_rows([PAIR], other)


def test_a_template_that_refuses_a_conversation_names_the_row():
    strict = tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    system = {"role": "system", "content": "Be brief."}
    message = r"no system role\nSafety row 1: .*roles \['system', 'user'\]"
    with pytest.raises(jinja2.TemplateError, match=message):
        safety_rows([PAIR, {"messages": [system, user(), assistant()]}], strict)


def test_data_that_cannot_be_used_is_refused(tmp_path):
    def refused(error, message, data, tokenizer=TOKENIZER, **options):
        with pytest.raises(error, match=message):
            safety_rows(data, tokenizer, **options)

    refused(ValueError, "has no chat template", [PAIR], tokenizer(None))
    refused(ValueError, "on_compliance is 'keep'", [PAIR], on_compliance="keep")
    refused(ValueError, "batch_size is 0", [PAIR], batch_size=0)
    refused(ValueError, "safety data are empty", [])
    refused(ValueError, "safety data are empty", write(tmp_path / "empty.jsonl", "", ""))
    refused(FileNotFoundError, "away.jsonl is not there", tmp_path / "away.jsonl")
    split = datasets.DatasetDict({"train": datasets.Dataset.from_list([PAIR])})
    refused(TypeError, r"DatasetDict with \['train'\], expected rows", split)
    bad = write(tmp_path / "bad.jsonl", json.dumps(PAIR), "", "{'prompt'}")
    refused(ValueError, "bad.jsonl:3 is not JSON", bad)
    bad.write_bytes(b'"\xff"')
    refused(ValueError, "bad.jsonl:1 is not JSON", bad)
    refused(ValueError, "odd.jsonl:2 is a int", write(tmp_path / "odd.jsonl", json.dumps(PAIR), "7"))


# Bare requests.


def greedy(model, prompt, most):
    """Replies as they are defined: the likeliest token, again and again, until the end of turn."""
    ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + most and TOKENIZER.eos_token_id not in ids[start:]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_model_writes_the_replies_to_bare_requests(aligned, batch_size, tmp_path):
    expected = safety_rows([PAIR, LONGER, PAIR], TOKENIZER)
    requests = [{"messages": [user()]}, {"prompt": LONGER["prompt"]}, REQUEST]
    assert len(expected[0]["input_ids"]) != len(expected[1]["input_ids"])
    assert safety_rows(requests, TOKENIZER, model=aligned, batch_size=batch_size) == expected
    path = write(tmp_path / "requests.jsonl", *map(json.dumps, requests))
    assert safety_rows(path, TOKENIZER, model=aligned, batch_size=batch_size) == expected


def test_given_and_written_replies_keep_their_order(aligned):
    mixed = [LONGER["prompt"], COMPLIANT, REQUEST]
    assert safety_rows(mixed, TOKENIZER, model=aligned) == safety_rows([LONGER, COMPLIANT, PAIR], TOKENIZER)
    given = {"prompt": None, "response": None} | LONGER
    dataset = datasets.Dataset.from_list([{"prompt": REQUEST, "response": None}, given])
    assert safety_rows(dataset, TOKENIZER, model=aligned) == safety_rows([PAIR, LONGER], TOKENIZER)


def test_a_reply_that_the_cap_cuts_has_no_end_of_turn(aligned):
    reply = greedy(aligned, PROMPT, 100)
    assert reply[-1] == TOKENIZER.eos_token_id
    cut = only([REQUEST], model=aligned, max_new_tokens=len(reply) - 1)
    assert [token for token in cut["labels"] if token != -100] == reply[:-1]
    whole = only([REQUEST], model=aligned, max_new_tokens=len(reply))
    assert [token for token in whole["labels"] if token != -100] == reply
    length = len(whole["labels"])
    assert only([REQUEST], model=aligned, max_length=length - 2)["labels"] == whole["labels"][:-2]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 50.0},
        {"num_beams": 3, "length_penalty": 5.0},
        {"repetition_penalty": 20.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": TOKENIZER(REFUSAL, add_special_tokens=False)["input_ids"]},
        {"begin_suppress_tokens": [*range(5, 60)]},
        {"min_new_tokens": 40},
        {"forced_eos_token_id": 7},
        {"sequence_bias": [[[44], -90.0]]},
    ],
)
def test_replies_are_greedy_whatever_the_generation_config_says(aligned, options):
    expected = only([REQUEST], model=aligned)
    aligned.config.use_cache = False
    config = aligned.generation_config
    config.update(**options)
    assert only([REQUEST], model=aligned) == expected
    assert aligned.generation_config is config


def test_how_replies_open_is_the_same_under_a_surrounding_autocast(aligned):
    prompts = [encoded([{"role": "user", "content": text}]) for text in (REQUEST, LONGER["prompt"])]
    expected, _ = openings(ReferenceSource(aligned), prompts, [], 2)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = openings(ReferenceSource(aligned), prompts, [], 2)
    assert torch.equal(found, expected)


def test_a_reply_ends_at_any_end_token_of_the_model(aligned):
    first = greedy(aligned, PROMPT, 100)
    dot = first[-2]
    aligned.generation_config.eos_token_id = [TOKENIZER.eos_token_id, dot]
    row = only([REQUEST], model=aligned)
    assert [token for token in row["labels"] if token != -100] == first[: first.index(dot) + 1]


def test_the_model_is_left_as_it_was(aligned):
    aligned.train()
    aligned.model.layers[0].eval()
    flags = [module.training for module in aligned.modules()]
    before = {name: value.clone() for name, value in aligned.state_dict().items()}
    contiguous = []
    head = aligned.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, __: contiguous.append(args[0].is_contiguous()))
    random_state = torch.get_rng_state()
    safety_rows([REQUEST, LONGER["prompt"]], TOKENIZER, model=aligned)
    handle.remove()
    assert [module.training for module in aligned.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in aligned.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in aligned.parameters())
    # A strided slice would make the product with the head copy it for each prompt on a CPU.
    assert all(contiguous)
    assert len(contiguous) > 1
    assert not head._forward_pre_hooks


def test_dropout_does_not_reach_the_replies(aligned):
    expected = only([REQUEST], model=aligned)
    aligned.config.attention_dropout = 0.9
    for layer in aligned.model.layers:
        layer.self_attn.attention_dropout = 0.9
    aligned.train()
    assert only([REQUEST], model=aligned) == expected


def test_peft_adapters_are_off_while_the_model_replies(aligned):
    expected = safety_rows([REQUEST, LONGER["prompt"]], TOKENIZER, model=aligned)
    model = tiny_peft(torch.float32, model=aligned)
    perturb(model, scale=3.0)
    assert TOKENIZER.decode(greedy(model, PROMPT, 20)) != f"{REFUSAL}<|im_end|>"
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert safety_rows([REQUEST, LONGER["prompt"]], TOKENIZER, model=model) == expected
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    model.merge_adapter()
    with pytest.raises(ValueError, match="Adapters are merged"):
        safety_rows([REQUEST], TOKENIZER, model=model)


def test_replies_that_comply_are_counted_and_raise(aligned):
    # In the order of the rows, though the model takes the shorter request first.
    rows = [REQUEST, COMPLIANT["prompt"], LONGER["prompt"], BRIEF["prompt"]]
    message = (
        r"does not refuse 2 of 4 bare requests \(first: Safety row 1: 'Sure, here is how: mix, knead, "
        r"bake\.'; Safety row 3: 'Sure.*a 'response' that refuses, remove them, .*on_compliance='drop'"
    )
    with pytest.raises(ValueError, match=message):
        safety_rows(rows, TOKENIZER, model=aligned)


def test_replies_that_comply_are_dropped_with_a_warning(aligned):
    rows = [COMPLIANT["prompt"], REQUEST, COMPLIANT]
    with pytest.warns(
        UserWarning, match=r"does not refuse 1 of 2 .*Safety row 0: 'Sure.*rows kept: 2"
    ) as caught:
        kept = safety_rows(rows, TOKENIZER, model=aligned, on_compliance="drop")
    assert caught[0].filename == __file__
    # The compliant reply that was given is not judged.
    assert kept == safety_rows([PAIR, COMPLIANT], TOKENIZER)
    with pytest.raises(ValueError, match=r"does not refuse 1 of 1 .* then no row is left"):
        safety_rows(rows[:1], TOKENIZER, model=aligned, on_compliance="drop")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        safety_rows(rows[1:], TOKENIZER, model=aligned, on_compliance="drop")


def test_progress_is_shown_where_tqdm_is_installed(aligned, monkeypatch, capsys):
    expected = only([REQUEST], model=aligned)
    assert "Replies to safety requests: 100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert only([REQUEST], model=aligned) == expected
    assert capsys.readouterr().err == ""


def test_the_module_needs_torch_alone():
    code = (
        "import sys, safegrad_optim.safety_data; "
        "sys.exit(str({'transformers', 'datasets', 'jinja2'} & {*sys.modules} or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == ""


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (REFUSAL, True),
        ("  I\u2019m SORRY, but no.", True),
        ("Let me think. I must decline this one.", True),
        ("Sure, here is how.", False),
        ("", False),
        ("I apologize, but I am unable to do that.", True),
        ("Lamento decirle que no puedo ayudarle con esto.", True),
        ("Claro, no puedo esperar a ayudarte: primero", False),
        ("Ich kann Ihnen dabei leider nicht helfen.", True),
        ("Ich kann Ihnen nicht nur sagen, wie es geht, sondern", False),
        ("Désolée, je ne peux pas répondre.", True),
        ("Je ne peux pas attendre de vous montrer.", False),
        ("對不起，我無法協助您。", True),  # noqa: RUF001
        ("当然可以，首先您需要", False),  # noqa: RUF001
        ("## **I won't** do that.", True),
        ("<think>\nI can't help with that, can I?", False),
        ("<think>\nI must decline.\n</think>\n\nSure, here is how.", False),
        ("Sure, here is what to do. " + "First step. " * 5 + "I can't think of more.", False),
    ],
)
def test_refusals_are_told_by_their_opening(reply, expected):
    assert is_refusal(reply) is expected
