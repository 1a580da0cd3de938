"""Axolotl itself, in an environment of its own: its bounds are not those of the other tests."""

import json
import subprocess
import sys

import pytest
import torch

from common.script import poisoned_rows
from common.smollm2 import load_aligned
from safegrad_optim import shipped_requests
from tests.support.environments import environment

CONFIG = """
base_model: {folder}/model
plugins:
  - safegrad_optim.integrations.axolotl.SafeGradPlugin
safegrad_requests: {folder}/requests.jsonl
safegrad_refresh_every: 2
max_grad_norm: 0
datasets:
  - {{path: {folder}/rows.jsonl, ds_type: json, type: chat_template, field_messages: messages}}
chat_template: tokenizer_default
dataset_prepared_path: {folder}/prepared
output_dir: {folder}/out
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
# Its own kernels want a GPU.
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
sequence_len: 256
micro_batch_size: 4
gradient_accumulation_steps: 1
max_steps: 4
logging_steps: 1
optimizer: adamw_torch
lr_scheduler: constant
learning_rate: 0.0003
bf16: false
fp16: false
tf32: false
flash_attention: false
gradient_checkpointing: false
use_cpu: true
"""


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def axolotl(tmp_path):
    """The command of Axolotl 0.19, with this package beside it."""
    return environment(tmp_path / "environment", "axolotl==0.19.0") / "axolotl"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Axolotl wants Linux")
def test_lines_of_yaml_protect_a_run_and_say_so_in_its_logs(axolotl, tmp_path):
    for part in load_aligned(torch.float32):
        part.save_pretrained(tmp_path / "model")
    written(tmp_path / "requests.jsonl", shipped_requests()[::30])
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in poisoned_rows(48)
    ]
    written(tmp_path / "rows.jsonl", rows)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    command = [axolotl, "train", tmp_path / "config.yaml", "--launcher", "python"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    assert "unsafe requests are refused" in output
    (state,) = (tmp_path / "out").glob("checkpoint-4/trainer_state.json")
    logs = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert [entry["safegrad/unprotected_steps"] for entry in logs] == [0] * 4
    assert logs[-1]["safegrad/alignment_norm"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
