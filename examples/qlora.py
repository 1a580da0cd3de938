"""QLoRA with SafeGrad, whole: from rows of chat to an adapter, and the table of what it has kept.

    python examples/qlora.py --model ID --data rows.jsonl
    python examples/qlora.py --compare           # SmolLM2 and poisoned tickets; runs on a CPU

Rows have "messages", or "prompt" and "response". Weights are in nf4, TRL's SFTTrainer trains; only the
replies are learned.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from common.script import aligned_model, conversation, lora, parse, poisoned_rows, train_arms
from safegrad_optim import ProtectionCheck, Reference, safety_sources
from safegrad_optim.integrations.transformers import protect_trainer
from safegrad_optim.safety_data import read_jsonl


def main(arguments: list[str] | None = None) -> None:
    options = parse("qlora", __doc__, arguments, compares=True)
    model, tokenizer = in_four_bits(options.model or saved_example(options.output_dir))
    given = [row for _, row in read_jsonl(options.data)] if options.data else poisoned_rows(options.rows)
    rows = [conversation(row) for row in given]
    sources = safety_sources(model, tokenizer, rows, requests=options.requests)
    print(sources)
    check = ProtectionCheck(model, tokenizer, sources)

    args = SFTConfig(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=False,  # computed in bf16 by the quantised layers, with adapters in fp32
        max_grad_norm=0,  # clips the user gradient alone; the optimizer below clips the final one
        logging_steps=5,
        report_to=[],
    )
    dataset = Dataset.from_list(rows)

    def trainer_of(model: Any) -> Any:
        return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora())

    def protect(trainer: Any) -> None:
        reference = Reference(resumed=options.resume)
        protect_trainer(trainer, sources, max_grad_norm=1.0, check=check, reference=reference)

    train_arms(model, check, trainer_of, protect, options)


def in_four_bits(name: str | Path) -> tuple[Any, Any]:
    """A model with nf4 weights, computed in bf16, and its tokenizer."""
    quantised = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = {"": 0 if torch.cuda.is_available() else "cpu"}
    load = AutoModelForCausalLM.from_pretrained
    model = load(name, quantization_config=quantised, device_map=device, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(name)


def saved_example(folder: Path) -> Path:
    """The aligned model of the examples, in a folder that it can be quantised from."""
    for part in aligned_model(torch.bfloat16):
        part.save_pretrained(folder / "aligned")
    return folder / "aligned"


if __name__ == "__main__":
    main()
