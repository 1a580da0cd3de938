"""A raw accelerate loop on several ranks, and in one process."""

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer
from safegrad_optim.parallel import world_size
from tests.support.models import perturb, safety_rows, tiny_peft, trainable
from tests.support.parallel_models import averaging, full
from tests.support.parallel_runs import STEPS, USER_ROWS, user_batch


def prepared(mode):
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    plugin = None
    if mode == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        # accelerate shards on accelerators only; nothing else of it asks for one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    model = tiny_peft(torch.float32)
    perturb(model, 0.1)
    alignment = KLAlignment(model, safety_rows(6), batch_size=2, reference=Reference(resumed=True))
    optimizer = SafeGradOptimizer(torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9), alignment)
    # Rows of one length: the mean over ranks of mean losses is then the mean over all tokens.
    rows = torch.cat([user_batch(step, part) for step in range(STEPS) for part in range(2)])
    loader = torch.utils.data.DataLoader(list(rows), batch_size=USER_ROWS // world_size())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, averaging(model), optimizer, loader


def train(folder, mode, start=0):
    """Train from the state saved at `start`, save at 2, and return full parameters and counts."""
    accelerator, model, optimizer, loader = prepared(mode)
    if start:
        accelerator.load_state(folder)
    for number, batch in enumerate(accelerator.skip_first_batches(loader, 2 * start)):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
        if number == 3 and not start:
            accelerator.save_state(folder)
    return [full(parameter) for parameter in trainable(model)], tuple(optimizer.optimizer.counts)
