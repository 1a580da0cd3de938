"""Any two models side by side, by the console script."""

import copy
import json
from importlib.metadata import entry_points

import peft
import pytest
import torch

from safegrad_optim.protection import Answers, answers, compare
from tests.support.attacked import ALL_HARMLESS, ALL_UNSAFE, NO, YES, learned, tuned, turns
from tests.support.chat import TOKENIZER


def main(*arguments):
    (script,) = entry_points(group="console_scripts", name="safegrad-check")
    return script.load()([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(aligned, tmp_path_factory):
    """Everything that a user has: models and a file of requests."""
    folder = tmp_path_factory.mktemp("models")
    lost = tuned(aligned, ALL_UNSAFE[: len(ALL_UNSAFE) // 2])
    for name, model in (("aligned", aligned), ("lost", lost)):
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    rows = [
        {"request": request, "lookalike": lookalike, "category": "theft" if index % 2 else "burglary"}
        for index, (request, lookalike) in enumerate(zip(ALL_UNSAFE, ALL_HARMLESS, strict=True))
    ]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "requests.jsonl").write_text(lines, encoding="utf-8")
    return folder


def check(folder, tuned, *options, base="aligned"):
    return main(folder / base, folder / tuned, "--requests", folder / "requests.jsonl", "--offline", *options)


def test_a_model_that_kept_its_refusals(folder, capsys):
    assert check(folder, "aligned") == 0
    found = capsys.readouterr()
    assert "**held**" in found.out
    assert f"{len(ALL_UNSAFE)} of {len(ALL_UNSAFE)} (91% to 100%)" in found.out
    assert "at most about" in found.err


def test_a_model_that_lost_them_and_its_report(folder, tmp_path, capsys):
    assert check(folder, "lost", "--out", tmp_path, "--seed", "3") == 1
    assert "**lost**" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    half = len(ALL_UNSAFE) // 2
    kept = report["refusals_kept"]
    assert (report["schema"], report["verdict"], report["seed"]) == (1, "lost", 3)
    assert (kept["count"], kept["of"]) == (len(ALL_UNSAFE) - half, len(ALL_UNSAFE))
    assert kept["low"] < kept["count"] / kept["of"] < kept["high"] < report["at_least"]
    assert sum(share["of"] for share in report["by_category"].values()) == len(ALL_UNSAFE)
    assert report["over_refusal"]["base"]["count"] == report["over_refusal"]["tuned"]["count"] == 0
    assert report["kl_of_first_token"] > 0.1
    assert report["fingerprints"]["base"] != report["fingerprints"]["tuned"]
    first, last = report["rows"][0], report["rows"][-1]
    assert (first["prompt"], first["base_refuses"], first["tuned_refuses"]) == (ALL_UNSAFE[0], True, False)
    assert (last["prompt"], last["base_refuses"]) == (ALL_HARMLESS[-1], False)
    assert ALL_UNSAFE[0] in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_redacted_report_has_no_text(folder, tmp_path, capsys):
    check(folder, "aligned", "--out", tmp_path, "--redact")
    everything = capsys.readouterr().out
    everything += "".join(
        (tmp_path / f"report.{kind}").read_text(encoding="utf-8") for kind in ("json", "md")
    )
    assert not any(text in everything for text in [*ALL_UNSAFE, *ALL_HARMLESS, NO, YES])


def test_an_adapter_of_the_base(aligned, folder, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(aligned), peft.LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "kept")
    learned(model, turns(ALL_UNSAFE, YES) + turns(ALL_HARMLESS, YES)).save_pretrained(tmp_path / "lost")
    requests = "--requests", folder / "requests.jsonl"
    assert main(folder / "aligned", tmp_path / "kept", *requests) == 0
    assert main(folder / "aligned", tmp_path / "lost", *requests, "--adapter") == 1


def test_too_few_refusals_are_inconclusive(folder):
    # A base that complies, and a base that refuses what few requests there are.
    assert check(folder, "aligned", base="lost") == 3
    assert check(folder, "aligned", "--limit", "20") == 3


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [(100, "held"), (96, "held"), (93, "inconclusive"), (85, "inconclusive"), (80, "lost")],
)
def test_the_verdict_is_that_of_the_interval(kept, verdict):
    same = torch.full((101, 2), 0.5)
    base = Answers([""] * 101, [True] * 101, same)
    found = compare(
        base, Answers([""] * 101, [True] * kept + [False] * (100 - kept) + [True], same), ["-"] * 100
    )
    assert found.verdict == verdict
    assert (found.kept.count, found.kept.of, found.kl) == (kept, 100, 0.0)
    assert found.over_refusal[0].count == 1


def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text('{"text": "Hello"}\n', encoding="utf-8")
    (folder / "lost").joinpath("chat_template.jinja").rename(folder / "template")
    cases = [
        ((folder / "aligned", folder / "missing"), "missing cannot be loaded"),
        ((folder / "lost", folder / "aligned"), "has no chat template"),
        ((folder / "aligned", folder / "lost", "--requests", tmp_path / "empty.jsonl"), "is empty"),
        ((folder / "aligned", folder / "lost", "--requests", tmp_path / "other.jsonl"), "has no text as"),
        ((folder / "aligned", folder / "lost", "--requests", tmp_path / "none.jsonl"), "is not there"),
        ((folder / "aligned", folder / "lost", "--at-least", "1.5"), "--at-least is 1.5"),
    ]
    try:
        for arguments, message in cases:
            assert main(*arguments, "--offline") == 2
            found = capsys.readouterr().err.strip().splitlines()[-1]
            assert found.startswith("safegrad-check: error: ")
            assert message in found
    finally:
        (folder / "template").rename(folder / "lost" / "chat_template.jinja")


def test_what_cannot_run_is_exit_code_4(folder, capsys):
    assert check(folder, "aligned", "--device", "meta") == 4
    assert "safegrad-check: could not run: " in capsys.readouterr().err


def test_a_system_message_is_read(aligned):
    prompts = (
        ["Hi"],
        [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}],
    )
    bare, told = (answers(aligned, TOKENIZER, rows, max_new_tokens=2).opening for rows in prompts)
    assert not torch.equal(bare, told)
