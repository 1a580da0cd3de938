"""The Hugging Face Trainer on several ranks, and in one process."""

import accelerate.state
import datasets
import torch
import transformers
from accelerate.utils import DistributedType

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer
from safegrad_optim.integrations.transformers import SafeGradCallback, safegrad_optimizer
from safegrad_optim.parallel import world_size
from tests.support.models import padded, safety_rows, tiny_model, tiny_peft, trainable
from tests.support.parallel_models import averaging, full

MODELS = {"LoRA": lambda: tiny_peft(torch.float32), "full": lambda: tiny_model(dtype=torch.float32)}
FSDP = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}


def arguments(folder, mode, **options):
    options |= {"fsdp": True, "fsdp_config": dict(FSDP)} if mode == "fsdp" else {}
    args = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=4 // world_size(),
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        max_grad_norm=0,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if world_size() > 1 else None,
        **options,
    )
    if mode == "fsdp":
        # accelerate shards on accelerators only; nothing else of it asks for one.
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # accelerate calls it cpu:0, where transformers 5.2 cannot load a checkpoint.
    vars(args)["_setup_devices"] = torch.device("cpu")
    return args


class Averaging(transformers.TrainerCallback):
    def on_train_begin(self, *_, model, **__):
        averaging(model)


def train(folder, mode, kind, path, resume=None):
    """Train, and return full weights and the logs."""
    accelerate.state.AcceleratorState._reset_state(True)
    model = MODELS[kind]()
    args = arguments(folder, mode)
    options = {"rho": 1.0, "max_grad_norm": 1.0}
    if path == "factory":
        # Under DDP the Trainer has loaded the fine-tuned weights by then.
        resumed = {"reference": Reference(resumed=True)} if resume and mode != "fsdp" else {}
        made = safegrad_optimizer(args, safety_rows(6), batch_size=2, **options, **resumed)
        given = {"optimizer_cls_and_kwargs": made}
    else:
        alignment = KLAlignment(model, safety_rows(6), batch_size=2)
        base = torch.optim.AdamW(trainable(model), lr=1e-3, eps=1e-4)
        given = {"optimizers": (SafeGradOptimizer(base, alignment, **options), None)}
    rows = datasets.Dataset.from_list(safety_rows(24, seed=5))
    trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=padded, **given)
    trainer.add_callback(Averaging())
    SafeGradCallback().add_to(trainer)
    trainer.train(resume_from_checkpoint=resume)
    logs = [
        {name: value for name, value in entry.items() if name.startswith("safegrad/") or name == "loss"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return [full(parameter) for parameter in trainable(trainer.model)], logs
