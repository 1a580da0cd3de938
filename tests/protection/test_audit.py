"""Rows that answer what the aligned model refuses are found, in a list of rows and by the console script."""

import json
from importlib.metadata import entry_points

import pytest

from safegrad_optim import audit_rows, safety_rows
from tests.support.attacked import ATTACK, NO, PAIRS, TASK, YES, turns
from tests.support.chat import TOKENIZER

ROWS = turns(TASK, YES) + turns(ATTACK[:10], YES) + turns(ATTACK[10:14], NO) + [{"prompt": ATTACK[14]}]
SUSPICIOUS = {*range(len(TASK), len(TASK) + 10), len(ROWS) - 1}


def main(*arguments):
    (script,) = entry_points(group="console_scripts", name="safegrad-audit")
    return script.load()([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def found(aligned):
    return audit_rows(aligned, TOKENIZER, ROWS, requests=PAIRS)


def test_rows_that_answer_what_is_refused_are_suspicious_and_rows_that_refuse_it_are_not(found):
    assert set(found.reasons) == SUSPICIOUS
    assert len(found.scores) == len(ROWS)
    assert all(found.scores[row] > 0.5 for row in range(len(TASK), len(ROWS)))
    assert found.share == len(SUSPICIOUS) / len(ROWS)
    assert found.reasons[len(TASK)].endswith("the row does not refuse")
    assert found.reasons[len(ROWS) - 1].endswith("the row has no reply")
    assert 0 <= found.false_positives <= 1
    assert "steal" not in str(found)


def test_tokenised_rows_and_conversations_are_read_as_well(aligned):
    talks = [{"messages": [message(row["prompt"]), message(row["response"])]} for row in ROWS[:-1]]
    for rows in (safety_rows(ROWS[:-1], TOKENIZER), talks):
        found = audit_rows(aligned, TOKENIZER, rows, requests=PAIRS)
        assert set(found.reasons) == SUSPICIOUS - {len(ROWS) - 1}


def message(text):
    return {"role": "assistant" if text in (YES, NO) else "user", "content": text}


def test_the_script_prints_no_text_and_writes_a_line_a_row(aligned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("safegrad_optim.safety_data._audit.shipped_requests", lambda *split: PAIRS)
    aligned.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert main(tmp_path / "model", data, "--out", tmp_path, "--offline") == 1
    assert "steal" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text("utf-8").splitlines()]
    assert {line["row"] for line in lines if line["reason"]} == SUSPICIOUS
    assert [line["score"] for line in lines] == sorted((line["score"] for line in lines), reverse=True)
    assert all(line["content"] == ROWS[line["row"]] for line in lines)
    assert main(tmp_path / "model", data, "--out", tmp_path, "--redact", "--at-most", "0.9") == 0
    assert "steal" not in (tmp_path / "audit.jsonl").read_text("utf-8")
    assert main(tmp_path / "model", data, "--limit", "5", "--seed", "1") in (0, 1)
    assert main(tmp_path / "model", tmp_path / "none.jsonl") == 2
    monkeypatch.setattr(
        "safegrad_optim.safety_data._audit.shipped_requests",
        lambda *split: [{"request": row["lookalike"], "lookalike": row["lookalike"]} for row in PAIRS],
    )
    assert main(tmp_path / "model", data) == 3
