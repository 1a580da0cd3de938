"""SafeGrad under FSDP2, without a framework: full fine-tuning of SmolLM2 on poisoned data.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 40 --resume

Each rank holds its part of parameters, gradients and optimizer state. The user task is to read order
numbers as JSON; 30 % of the rows are unsafe requests with the opening of a compliant reply. It runs on
GPUs with NCCL where there are some, else on the CPU with gloo; a checkpoint can be resumed on another
number of ranks.
"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import DataCollatorForSeq2Seq

from common.script import aligned_model, parse, poisoned_rows, start_ranks
from safegrad_optim import KLAlignment, ProtectionCheck, SafeGradOptimizer, safety_rows, safety_sources

BATCH_SIZE = 4  # rows to a step, over all ranks


def main(arguments: list[str] | None = None) -> None:
    options = parse("fsdp2", __doc__, arguments, steps=20)

    device, rank, size = start_ranks()
    model, tokenizer = aligned_model(torch.float32)
    model.requires_grad_(True)  # merging the safety adapter has frozen it
    mesh = init_device_mesh(device, (size,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)

    rows, collate = safety_rows(poisoned_rows(options.rows), tokenizer), DataCollatorForSeq2Seq(tokenizer)

    # After fully_shard, while the model is the aligned one. All ranks give all rows.
    sources = safety_sources(model, tokenizer, rows, requests=options.requests)
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
        start = optimizer.counts.steps * BATCH_SIZE % (len(rows) - BATCH_SIZE)
        chosen = rows[start : start + BATCH_SIZE]
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
            cosine, kl = optimizer.stats.cosine.item(), alignment.last_loss.item()
            print(f"step {optimizer.counts.steps}: loss {loss / size:.4f}, cosine {cosine:+.4f}, KL {kl:.5f}")

    after = check.judged(options.steps)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=options.output_dir)
    if rank == 0:
        print(f"{sources}\nBefore: {before}\nAfter: {after}")
        print(f"{optimizer.counts}. Checkpoint: {options.output_dir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
