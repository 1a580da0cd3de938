"""SafeGrad under FSDP2, without a framework: full fine-tuning of SmolLM2 on poisoned data.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 40 --resume

Each rank holds its part of parameters, gradients and optimizer state. The user task is to read order
numbers as JSON; 30 % of the rows are unsafe requests with the opening of a compliant reply. It runs on
GPUs with NCCL where there are some, else on the CPU with gloo; a checkpoint can be resumed on another
number of ranks.
"""

import argparse
import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import DataCollatorForSeq2Seq

from common.chat_data import harmful_turns, read_rows
from common.smollm2 import load_aligned
from safegrad_optim import (
    KLAlignment,
    ProtectionCheck,
    SafeGradOptimizer,
    safety_rows,
    safety_sources,
    shipped_requests,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps in all (default: 20)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows to a step, over all ranks")
    parser.add_argument("--every", type=int, default=4, help="use every so many of the shipped requests")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/fsdp2"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint saved there")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    model, tokenizer = load_aligned(torch.float32)
    model.requires_grad_(True)  # merging the safety adapter has frozen it
    if device == "cpu":
        model.set_attn_implementation("eager")  # twice as fast on a CPU
    mesh = init_device_mesh(device, (size,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)

    harmful = [turn._asdict() for turn in harmful_turns("attack")]
    rows = safety_rows(read_rows("tickets", "train")[:224] + harmful, tokenizer)
    random.Random(0).shuffle(rows)
    collate = DataCollatorForSeq2Seq(tokenizer)

    # After fully_shard, before the weights change: the reference is the aligned model. All ranks give
    # all safety rows, each computes its share.
    sources = safety_sources(model, tokenizer, rows, requests=shipped_requests()[:: options.every])
    check = ProtectionCheck(model, tokenizer, sources)
    before = check.judged(0)
    alignment = KLAlignment(model, sources)
    optimizer = SafeGradOptimizer(
        torch.optim.AdamW(model.parameters(), lr=2e-5), alignment, max_grad_norm=1.0
    )
    if options.resume:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=options.output_dir)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    model.train()
    while optimizer.counts.steps < options.steps:
        start = optimizer.counts.steps * options.batch_size % (len(rows) - options.batch_size)
        chosen = rows[start : start + options.batch_size]
        # FSDP2 averages over ranks: of this loss, that is the mean over all tokens of the step.
        tokens = sum(label != -100 for row in chosen for label in row["labels"][1:])
        inputs = {name: tensor.to(device) for name, tensor in collate(chosen[rank::size]).items()}
        loss = model(**inputs, num_items_in_batch=tokens / size).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        check(optimizer.counts.steps)
        if rank == 0:
            steps, cosine = optimizer.counts.steps, optimizer.stats.cosine.item()
            kl = alignment.last_loss.item()
            print(f"step {steps}: loss {loss / size:.4f}, cosine {cosine:+.4f}, KL {kl:.5f}", flush=True)

    after = check.judged(options.steps)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=options.output_dir)
    if rank == 0:
        print(f"{sources}\nBefore: {before}\nAfter: {after}")
        print(f"{optimizer.counts}. Checkpoint: {options.output_dir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
