import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cost import surgery
from safegrad_optim import combine_

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compared_ways_do_the_same(dtype):
    results = {}
    for name, way in surgery.WAYS.items():
        user, alignment = surgery.gradients([(300, 7), (50,)], dtype, "cpu")
        torch.manual_seed(0)
        noise = [torch.randn_like(a) for a in alignment]
        surgery.conflicting(user, alignment)
        torch._foreach_add_(user, noise)
        if name != "loop" or dtype == torch.float32:
            way(user, alignment)
            results[name] = user
    for name, found in results.items():
        for left, right in zip(found, results["safegrad"], strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=name)


def test_the_gradients_conflict():
    user, alignment = surgery.gradients([(40,), (3, 3)], torch.float32, "cpu")
    surgery.conflicting(user, alignment)
    _, stats = combine_(user, alignment)
    assert stats.conflict


def test_shapes_are_those_of_the_models():
    def elements(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes)

    assert elements(surgery.smollm2_shapes()) == 134_515_008
    # (r (4096 + 4096) for q, r (4096 + 1024) for k and for v) in 32 layers
    assert elements(surgery.llama_lora_shapes()) == 32 * 8 * (8192 + 5120 + 5120)


@pytest.mark.slow
def test_runs_on_the_real_model(tmp_path):
    command = [sys.executable, "-m", "benchmarks.cost.cost", "--modes", "lora", "--steps", "20"]
    command += ["--repetitions", "1", "--largest", "1e7", "--output-dir", tmp_path]
    subprocess.run(command, check=True, cwd=EXAMPLES)
    found = json.loads((tmp_path / "cost.json").read_text())
    seconds = {arm: values[0] for arm, values in found["lora"]["seconds"].items()}
    assert seconds["plain"] < seconds["k = 10"] < seconds["k = 4"] < seconds["k = 1"]
    assert (tmp_path / "cost.svg").stat().st_size > 1000
    assert (tmp_path / "scaling.svg").stat().st_size > 1000
