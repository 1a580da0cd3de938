"""Training runs that are the same in one process and, parallel in some way, in several."""

import contextlib
import dataclasses
import os
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from safegrad_optim import (
    KLAlignment,
    LossAlignment,
    ProtectionCheck,
    Reference,
    SafeGradOptimizer,
    SafetySource,
    SafetySources,
)
from safegrad_optim.alignment import _base as alignment
from safegrad_optim.optimizer import _step as surgery_step
from safegrad_optim.parallel import _fsdp
from safegrad_optim.safety_data import refused_prompts
from safegrad_optim.safety_data._calibration import Opening
from safegrad_optim.safety_data._rows import opening_rows
from safegrad_optim.safety_data._training_prompts import TrainingPrompt
from tests.support.chat import TOKENIZER
from tests.support.models import perturb, safety_rows, tiny_model, tiny_peft, trainable
from tests.support.parallel_models import full, parallel, shard, sum_gradients, tensor_parallel, unreduced

STEPS = 5
USER_ROWS = 4


def user_batch(step, part, rank=0, size=1):
    """This rank's rows of one micro-batch of a step."""
    generator = torch.Generator().manual_seed(10 * step + part)
    return torch.randint(3, 60, (USER_ROWS, 8), generator=generator)[rank::size]


def user_loss(model, ids):
    logits = model(input_ids=ids).logits
    logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        ids[:, 1:].flatten(),
    )


def build(
    mode=None,
    kind="full",
    dtype=torch.float32,
    optimizer="sgd",
    rows=5,
    given="wrapped",
    parallel_options=None,
    align="kl",
    alignment_options=None,
    sources=1,
    **options,
):
    settings = ({"batch_size": 5} if sources == 1 else {}) | (alignment_options or {})
    safety = safety_rows(rows)
    if sources > 1:
        # The last has fewer rows than there are ranks.
        safety = [
            SafetySource(
                rows=safety_rows(rows, seed=number), batch_size=3, tokens=number + 1, weight=1 / (number + 1)
            )
            for number in range(sources - 1)
        ] + [SafetySource(rows=safety_rows(2, seed=9), batch_size=1)]
    if kind == "peft":
        # Away from the reference, near which the gradient of KL is a difference of equals, and from
        # zero, relative to which any rounding is large.
        model = tiny_peft(dtype=dtype)
        perturb(model, 0.1)
        if align == "kl":
            reference = settings.get("reference", Reference())
            settings["reference"] = dataclasses.replace(reference, resumed=True)
    else:
        model = tiny_model(dtype=dtype, num_key_value_heads=2)
    inner = model
    make = KLAlignment if align == "kl" else LossAlignment
    early = make(inner, safety, **settings) if given == "before" else None
    model, rank, size = parallel(model, mode, parallel_options or {})
    aligned = early or make({"wrapped": model, "inner": inner}[given], safety, **settings)
    if optimizer == "adamw":
        base = torch.optim.AdamW(trainable(model), lr=1e-3, eps=1e-4)
    else:
        base = torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)
    return model, SafeGradOptimizer(base, aligned, **options), rank, size


def checkpointed(folder, start, steps, mode, **options):
    """Go on from the sharded checkpoint of step `start`, take `steps` steps and save another."""
    model, wrapped, rank, size = build(mode=mode, rows=6, alignment_options={"batch_size": 2}, **options)
    if start:
        weights, state = get_state_dict(model, wrapped)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{start}")
        set_state_dict(model, wrapped, model_state_dict=weights, optim_state_dict=state)
    for step in range(start, start + steps):
        user_loss(model, user_batch(step, 0, rank, size)).backward()
        wrapped.step()
        wrapped.zero_grad()
    weights, state = get_state_dict(model, wrapped)
    if not start:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{steps}")
    momenta = [full(state["momentum_buffer"]) for state in wrapped.state.values()]
    return [full(parameter) for parameter in trainable(model)] + momenta, tuple(wrapped.counts)


def train(micro_batches=1, evaluated=False, summed=False, **options):
    """Train and return the full parameters, counts and statistics.

    Args:
        evaluated: run the model without gradients before each step.
        summed: have FSDP2 sum the gradients of losses that are shares of the whole.
    """
    model, wrapped, rank, size = build(**options)
    if summed:
        sum_gradients(model)
    stats = []
    for step in range(STEPS):
        for part in range(micro_batches):
            ids = user_batch(step, part, rank, size)
            last = part == micro_batches - 1
            with contextlib.nullcontext() if last else unreduced(model):
                (user_loss(model, ids) / micro_batches / (size if summed else 1)).backward()
        if evaluated:
            with torch.no_grad():
                user_loss(model, ids)
        wrapped.step()
        wrapped.zero_grad()
        stats.append(wrapped.stats.to_dict() | {"loss": float(wrapped.alignment.last_loss)})
    parameters = [full(parameter) for parameter in trainable(model)]
    return {"parameters": parameters, "counts": tuple(wrapped.counts), "stats": stats}


def train_without_reduction(noticed, **options):
    """The classic bug: each rank projects on the gradient of its own safety rows."""
    saved = alignment.mean_over_ranks, surgery_step.require_same
    alignment.mean_over_ranks = lambda loss, parameters=(), grads=(): (loss, list(grads))
    if not noticed:
        surgery_step.require_same = lambda values, advice: None
    try:
        return train(**options)
    finally:
        alignment.mean_over_ranks, surgery_step.require_same = saved


NOT_SENT = ("wait_tensor", "_wrap_tensor_autograd")


class Collectives(TorchDispatchMode):
    """Names of the collectives inside, and the bytes of the larger of what goes in and what comes out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name not in NOT_SENT:
            tensors = [value for value in torch.utils._pytree.tree_leaves(args) if hasattr(value, "nbytes")]
            self.seen.append((name, max(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def collectives(**options):
    """The collectives of a step, of the next with the same alignment gradient, and of the user's part."""
    model, wrapped, rank, size = build(refresh_every=2, **options)
    users, found = [], []
    for _ in range(4):
        with Collectives() as seen:
            backward(model, rank, size)
        users.append(seen.seen)
        with Collectives() as seen:
            wrapped.step()
        found.append(seen.seen)
        wrapped.zero_grad()
    # The first step's alignment gradient is zero and serves no other; until then options are compared.
    sizes = [parameter.numel() for parameter in trainable(model)]
    return {"refreshed": found[3], "reused": found[2], "user": users[3], "sizes": sizes}


def stays_as_it_was(micro_batches, head_unused=False, **options):
    """Largest difference that alignment gradients between the user's passes make to a gradient."""
    found = []
    for interrupted in (False, True):
        model, wrapped, rank, size = build(mode="ddp", **options)
        for step in range(3):
            for part in range(micro_batches):
                ids = user_batch(step, part, rank, size)
                with unreduced(model) if part < micro_batches - 1 else contextlib.nullcontext():
                    output = model(input_ids=ids, output_hidden_states=True)
                    (output.hidden_states[-1] if head_unused else output.logits).pow(2).mean().backward()
                # Arms DDP for a backward pass that never comes.
                model(input_ids=ids)
                if interrupted:
                    wrapped.alignment(trainable(model))
            grads = [parameter.grad for parameter in trainable(model)]
            found += [None if grad is None else full(grad) for grad in grads]
            wrapped.unwrap().step()
            wrapped.zero_grad()
    half = len(found) // 2
    pairs = list(zip(found[:half], found[half:], strict=True))
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None)


def settings_after_step(**options):
    """FSDP2 settings and shardedness before and after a step."""
    model, wrapped, rank, size = build(mode="fsdp", **options)
    sharded = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    backward(model, rank, size)
    model.set_requires_gradient_sync(False)
    model.set_is_last_backward(False)
    model.set_reshard_after_backward(False)
    wrapped.step()
    sharded += [isinstance(parameter, DTensor) for parameter in model.parameters()]
    state = model._get_fsdp_state()
    group = _fsdp._fsdp_groups(model)[0]
    return all(sharded), group.reduce_grads, state._state_ctx.is_last_backward, group.reshard_after_backward


def fingerprint_of(mode, kind="full"):
    _, wrapped, _, _ = build(mode=mode, kind=kind)
    return wrapped.alignment.state_dict()["reference"]


def refused_scores(mode, batch_size):
    """Scores of training prompts by an untrained model, which are of no use but differ."""
    model = tiny_model(dtype=torch.float32, vocab_size=len(TOKENIZER), num_key_value_heads=2)
    model, _, _ = parallel(model, mode, {})
    words = ["lock", "car", "door", "bike", "safe", "boat", "shed"]
    data, unsafe, harmless = ([f"{verb} the {word}." for word in words] for verb in ("See", "Steal", "Wash"))
    options = {"unsafe": unsafe[:3], "harmless": harmless[:3], "neighbours": 2, "batch_size": batch_size}
    return refused_prompts(model, TOKENIZER, data, **options).scores


def openings_of_replies(mode):
    """The rows that the model's own replies make, of prompts of different lengths."""
    model = build(mode=mode)[0]
    prompts = [[5, 9, 12], [7, 30, 31, 32, 33], [40], [41, 42]]
    return opening_rows(model, TOKENIZER, prompts, tokens=2, batch_size=3)


def checked(mode):
    """What a check finds by an untrained model before and after its weights move, and by decoding."""
    model = tiny_model(dtype=torch.float32, vocab_size=len(TOKENIZER), num_key_value_heads=2)
    odds = torch.arange(len(TOKENIZER)) % 2 * 1.0
    model, _, _ = parallel(model, mode, {})
    kept_out = [TrainingPrompt(row, (5, 9, 12 + row)) for row in range(20)]
    sources = SafetySources({}, "", None, kept_out, [], Opening([], odds, odds, odds, 1.0, 1.0), None)
    refuses = {"is_refusal": lambda reply: sum(map(ord, reply)) % 2 == 0, "batch_size": 5}
    check = ProtectionCheck(model, TOKENIZER, sources, count=10, on_leak="stop", **refuses)
    found = [check.judged(0), check.decoded(0)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            parameter.mul_(-0.5)
        return [*found, check.judged(1), check.decoded(1)]


def warm_up_from_zero_with_nothing_on_a_rank():
    """Steps taken at lr = 0, which looks like what torch.distributed.checkpoint does to make states."""
    model, wrapped, rank, size = build(mode="fsdp")
    wrapped.param_groups[0]["lr"] = 0.0
    backward(model, rank, size)
    if rank == 1:
        for parameter in trainable(model):
            parameter.grad.to_local().zero_()
    wrapped.step()
    return wrapped.counts.steps


def fp16_scale_after_overflow():
    """The scale at which fp16 gradients are finite on all ranks, come from where those of one are not."""
    model, wrapped, _, _ = build(mode="fsdp", kind="peft", dtype=torch.float16)
    wrapped.alignment._fp16_scale = 2.0**40
    grads = wrapped.alignment(trainable(model))
    assert all(full(grad).isfinite().all() for grad in grads)
    return wrapped.alignment._fp16_scale


def backward(model, rank, size):
    user_loss(model, user_batch(0, 0, rank, size)).backward()


# --- faults: each of these has to raise on all ranks -------------------------------------------------


def alignment_is_not_finite_on_a_rank(mode):
    model, wrapped, rank, size = build(mode=mode)
    backward(model, rank, size)
    losses = wrapped.alignment._losses
    scale = float("nan") if dist.get_rank() == 1 else 1.0
    wrapped.alignment._losses = lambda index=None: (loss * scale for loss in losses(index))
    take_refused_step(model, wrapped)


def user_gradient_is_not_finite_on_a_rank(mode):
    model, wrapped, rank, size = build(mode=mode)
    backward(model, rank, size)
    if dist.get_rank() == 1:
        shards = [p.grad.to_local() for p in trainable(model) if isinstance(p.grad, DTensor)]
        next(shard for shard in shards if shard.numel()).fill_(torch.nan)
    take_refused_step(model, wrapped)


def take_refused_step(model, wrapped):
    before = [full(parameter) for parameter in trainable(model)]
    try:
        wrapped.step()
    finally:
        after = [full(parameter) for parameter in trainable(model)]
        if not all(map(torch.equal, before, after)):
            raise AssertionError("the refused step has moved parameters")


def user_gradient_is_not_reduced(mode, scattered_only=False, **options):
    """The last backward pass of a step without reduction; under FSDP2 after one with it."""
    model, wrapped, rank, size = build(mode=mode, kind="peft", **options)
    if mode != "ddp":
        backward(model, rank, size)
    if scattered_only:
        model.set_requires_all_reduce(False)
        backward(model, rank, size)
    else:
        with unreduced(model):
            backward(model, rank, size)
    wrapped.step()


def alignment_gradients_of_their_own():
    """What a callable does that forgets to average over ranks."""
    model, wrapped, rank, size = build(mode="ddp")
    backward(model, rank, size)
    own = [parameter.grad * (1 + rank) for parameter in trainable(model)]
    wrapped.set_alignment_grad(own)
    wrapped.step()


def other_rows_on_a_rank():
    KLAlignment(tiny_peft(), safety_rows(seed=dist.get_rank()))


def other_rho_on_a_rank():
    train(mode="ddp", rho=1.0 + dist.get_rank())


def tensor_parallel_after_the_alignment():
    _, wrapped, _, _ = build(mode="ddp")
    tensor_parallel(wrapped.alignment.model, init_device_mesh("cpu", (dist.get_world_size(),)))
    wrapped.alignment(trainable(wrapped.alignment.model))


def head_written_before_sharding():
    model = tiny_peft()
    alignment = KLAlignment(model, safety_rows())
    with torch.no_grad():
        # On one rank's shard only.
        model.get_base_model().lm_head.weight[0].mul_(2)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    alignment(trainable(model))


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    KLAlignment(FullyShardedDataParallel(tiny_model(), device_id=torch.device("cpu")), safety_rows())


def deepspeed_zero3():
    model = tiny_peft()
    next(model.parameters()).ds_id = 0
    KLAlignment(model, safety_rows())


def deepspeed_zero2():
    """As its optimizer does, whose parameter groups hold flat partitions of the parameters."""
    model, wrapped, rank, size = build(mode="ddp")
    flat = torch.cat([parameter.detach().view(-1) for parameter in trainable(model)])
    (partition,) = [torch.nn.Parameter(part) for part in flat.chunk(size)[rank : rank + 1]]
    partition.grad = torch.ones_like(partition)
    wrapped.param_groups[0]["params"] = [partition]
    wrapped.step()


def ddp_of_a_part_of_the_ranks():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model = torch.nn.parallel.DistributedDataParallel(tiny_peft(), process_group=groups[dist.get_rank()])
    KLAlignment(model, safety_rows())


def with_cache_file():
    KLAlignment(tiny_peft(), safety_rows(), reference=Reference(file="reference.safetensors"))


def dies_before_the_step(dying):
    model, wrapped, rank, size = build(mode="fsdp")
    backward(model, rank, size)
    if rank == dying:
        os._exit(1)
    wrapped.step()
