"""DeepSpeed itself, in an environment of its own: each stage of ZeRO is refused before anything moves."""

import os
import subprocess

import pytest

from tests.support.environments import ROOT, environment


@pytest.mark.slow
def test_each_stage_of_zero_is_refused_by_name(tmp_path):
    commands = environment(tmp_path / "environment", "deepspeed", "transformers", DS_BUILD_OPS="0")
    messages = {
        1: "All 1 alignment gradients are None",
        2: "if DeepSpeed ZeRO put others in place, use FSDP2",
        3: "The model is in DeepSpeed ZeRO-3, which hides its gradients",
    }
    for stage, message in messages.items():
        result = subprocess.run(
            [commands / "python", ROOT / "tests/support/deepspeed_run.py", str(stage)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "MASTER_PORT": str(29517 + stage)},
        )
        assert result.returncode != 0
        assert message in result.stderr, result.stderr[-2000:]
