"""The ways in which a model is parallel, each on the CPU."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

# In torch 2.8 gloo's reduce_scatter sums where it is asked for a mean (pytorch issue 162338); not in 2.13.
GLOO_AVERAGES = torch.__version__ >= "2.13"


def decoder_layers(model):
    return [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]


def shard(model, mesh, own_head=False, **options):
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, **options)
    if own_head:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, **options)
    return averaging(fully_shard(model, mesh=mesh, **options))


def tensor_parallel(model, mesh, local_logits=True):
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    for layer in decoder_layers(model):
        parallelize_module(layer, mesh, plan)
    layout = Replicate() if local_logits else Shard(-1)
    parallelize_module(
        model.lm_head, mesh, ColwiseParallel(output_layouts=layout, use_local_output=local_logits)
    )
    distribute_module(model.model.norm, mesh, None, _split_tokens, _join_tokens)


def _split_tokens(_, inputs, mesh):
    """As in sequence parallelism, which leaves the gradient of a weight to be summed over ranks."""
    whole = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(1)])


def _join_tokens(_, output, mesh):
    return output.redistribute(placements=[Replicate()]).to_local()


def parallel(model, mode, options):
    """The parallel model, and this rank's data-parallel rank and size."""
    if mode is None:
        return model, 0, 1
    rank, size = dist.get_rank(), dist.get_world_size()
    if mode == "ddp":
        return DistributedDataParallel(model, **options), rank, size
    if mode == "fsdp":
        return shard(model, init_device_mesh("cpu", (size,)), **options), rank, size
    if mode == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        return shard(model, mesh, **options), rank, size
    if mode == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (size,)), **options)
        return model, 0, 1
    assert mode == "fsdp_tp"
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    return shard(model, mesh["dp"], **options), mesh["dp"].get_local_rank(), 2


@contextlib.contextmanager
def unreduced(model):
    """Around the backward pass of a micro-batch that is not the last."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def averaging(model):
    """The model, told not to leave the division of gradients to gloo where that does not divide."""
    if not GLOO_AVERAGES:
        for module in fsdp_modules(model):
            module.set_force_sum_reduction_for_comms(True)
    return model


def fsdp_modules(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sum_gradients(model):
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        # gloo knows no other way to divide by a factor.
        module.set_force_sum_reduction_for_comms(True)


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
