"""The quickstart: what it says of bad input, and that it runs on the real model."""

import json

import pytest

import quickstart
from common.chat_data import read_rows
from safegrad_optim import is_refusal, shipped_requests

GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.fixture
def run(capsys):
    def run(*arguments):
        try:
            code: object = quickstart.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("--user-data", None, "rows.jsonl is not there"),
        ("--user-data", "", "has no rows"),
        ("--user-data", GOOD + "{", r"rows.jsonl:2 is not JSON"),
        ("--user-data", GOOD + '{"prompt": "a"}', "rows.jsonl:2 has no text in 'response'"),
        ("--user-data", '["a"]', "rows.jsonl:1 has no text in 'prompt'"),
        ("--user-data", GOOD * 4, "4 rows; at least 5"),
        ("--safety-data", '{"request": "a", "lookalike": " "}', "rows.jsonl:1 has no text in 'lookalike'"),
        ("--eval-data", '{"response": "a"}', "rows.jsonl:1 has no text in 'prompt'"),
    ],
)
def test_a_bad_file_is_one_line_and_exit_code_2(run, tmp_path, flag, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    code, output = run(flag, path)
    assert code == 2
    assert output.err.startswith("quickstart: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--harmful-ratio", 1.5), "1.5 is not between 0 and 1"),
        (("--steps", 0), "0 is not a whole number >= 1"),
        (("--rho", -1), "-1 is not a finite number >= 0"),
        (("--lr", "nan"), "nan is not a finite number >= 0"),
        (("--device", "abacus"), "abacus is not a device here"),
    ],
)
def test_a_bad_option_is_named_and_exit_code_2(run, arguments, message):
    code, output = run(*arguments)
    assert code == 2
    assert message in output.err


@pytest.mark.parametrize("name", ["evaluation", "attack", "safety"])
def test_every_split_of_the_data_is_disjoint_and_complete(name):
    rows = read_rows("unsafe_requests")
    own = {row["prompt"] for row in rows if row["split"] == name}
    others = {row["prompt"] for row in rows if row["split"] != name}
    assert len(own) == 96
    assert not own & others
    assert all(is_refusal(row["refusal"]) for row in rows)


def test_runs_on_the_real_model(run, tmp_path):
    # A few requests: the passes over all of them would be most of this test's time.
    safety = tmp_path / "safety.jsonl"
    safety.write_text("".join(json.dumps(row) + "\n" for row in shipped_requests()[::40]))
    few = ("--steps", 3, "--limit", 4, "--batch-size", 2)
    code, output = run(*few, "--safety-data", safety, "--output-dir", tmp_path)
    assert code == 0, output.err
    for row in ("harmful score", "task accuracy", "over-refusal", "KL to the reference", "conflict rate"):
        assert sum(line.startswith(f"| {row}") for line in output.out.splitlines()) == 1
    results = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert results["before"]["harmful_score"] == 0.0  # it starts from a model that refuses
    assert results["SafeGrad"]["steps"] == [0, 1, 2]
    # And is anchored to it, but for how bf16 rounds in a batch of other rows.
    assert results["SafeGrad"]["kl"][0] < 1e-3
    assert "unsafe requests are refused" in output.out
    assert (tmp_path / "curves.svg").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_it_shows_what_the_readme_says(run, seed, tmp_path):
    code, output = run("--seed", seed, "--output-dir", tmp_path)
    assert code == 0, output.err
    arms = json.loads((tmp_path / "results.json").read_text())["arms"]
    before, plain, protected = (arms[name] for name in ("before", "plain", "SafeGrad"))
    assert plain["refusals_kept"] <= 0.2
    assert protected["refusals_kept"] >= 0.97
    assert protected["task_accuracy"] >= plain["task_accuracy"] - 0.03
    assert abs(protected["over_refusal"] - before["over_refusal"]) <= 0.05
