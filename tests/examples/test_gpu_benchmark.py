"""The benchmark for a GPU, as far as a CPU goes: its paths, and that what is wrong is told."""

import json

import pytest
import torch

from benchmarks import gpu
from safegrad_optim import combine


def run(path, *sections):
    code = gpu.main(["--device", "cpu", "--tiny", "--only", *sections, "--output", str(path)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of bitsandbytes and transformers
def test_sections_run_on_a_cpu_and_write_lines_of_their_machine(tmp_path):
    code, lines = run(tmp_path / "out" / "gpu.jsonl", "correctness", "waits", "four_bit")
    assert code == 0
    assert [line["section"] for line in lines] == ["correctness"] * 5 + ["waits"] * 4 + ["four_bit"] * 2
    assert all(line["right"] for line in lines[:5])
    assert all(line["card"].endswith("CPU threads") and line["versions"]["torch"] for line in lines)
    plain, recipe = lines[-2:]
    assert plain["over plain"] == 1.0
    assert recipe["ms"] == pytest.approx(recipe["over plain"] * plain["ms"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_sections_run_on_a_cpu(tmp_path):
    names = [section.__name__ for section in gpu.SECTIONS]
    code, lines = run(tmp_path / "gpu.jsonl", *names)
    assert code == 0
    assert list(dict.fromkeys(line["section"] for line in lines)) == names


def test_wrong_surgery_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "combine", lambda user, alignment, rho: combine(user, alignment, 1.01 * rho))
    code, lines = run(tmp_path / "gpu.jsonl", "correctness")
    assert code == 1
    assert [line["right"] for line in lines] == [False] * 4 + [True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "gpu.jsonl")]) == 2
    assert "there is no GPU. --device cpu --tiny" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
