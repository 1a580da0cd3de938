"""How ranks come to agree: sums, means and comparisons over the process group."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safegrad_optim.parallel._tensors import is_distributed_tensor, world_size

# Elements averaged by one collective: bounds the fp32 copy of the gradient.
_BUCKET = 1 << 26


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum over all ranks, the same bits on each: one all-reduce."""
    # With CPU offload gradients are where NCCL alone does not reach.
    reached = f"{values.device.type}:" in dist.get_backend_config()
    total = values.to(values.device if reached else torch.accelerator.current_accelerator(), copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def on_any_rank(flag: bool | Tensor) -> bool:
    """Return whether a flag is set on at least one rank; all ranks have to ask together."""
    return bool(flag if world_size() == 1 else sum_over_ranks(torch.as_tensor(flag, dtype=torch.float32)))


@torch.no_grad()
def mean_over_ranks(
    loss: Tensor, parameters: Sequence[Tensor] = (), grads: Sequence[Tensor | None] = ()
) -> tuple[Tensor, list[Tensor | None]]:
    """Average a loss over all ranks, and with it the gradients of plain parameters, in fp32 or better.

    FSDP2 has averaged those of sharded ones already. A gradient is `None` where no rank has one.
    """
    plain = [index for index, parameter in enumerate(parameters) if not is_distributed_tensor(parameter)]
    # Whether a rank has a gradient may depend on its rows, as for the experts of a mixture.
    present = torch.tensor([float(grads[index] is not None) for index in plain], device=loss.device)
    mean = sum_over_ranks(torch.cat([loss.detach().reshape(1), present.to(loss.dtype)])) / world_size()
    averaged = list(grads)
    somewhere = [index for index, share in zip(plain, mean[1:].tolist(), strict=True) if share > 0]
    for bucket in _buckets(somewhere, parameters):
        found = [(grads[index], parameters[index]) for index in bucket]
        own = [torch.zeros_like(parameter) if grad is None else grad for grad, parameter in found]
        wide = [grad.reshape(-1).to(torch.promote_types(grad.dtype, torch.float32)) for grad in own]
        parts = (sum_over_ranks(torch.cat(wide)) / world_size()).split([grad.numel() for grad in own])
        for index, part, grad in zip(bucket, parts, own, strict=True):
            averaged[index] = part.view(grad.shape).to(grad)
    return mean[0], averaged


def _buckets(indices: list[int], parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Lists of indices of the parameters, on one device, that are averaged together."""
    bucket: list[int] = []
    size = 0
    for index in indices:
        apart = bucket and parameters[index].device != parameters[bucket[0]].device
        if bucket and (apart or size + parameters[index].numel() > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(index)
        size += parameters[index].numel()
    if bucket:
        yield bucket


def of_all_ranks(value: Any) -> list[Any]:
    """Return what each rank gave, by rank; all ranks have to ask together."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def require_same(values: Mapping[str, Any], advice: str) -> None:
    """Check that all ranks were given the same: small values with a repr that tells them, by name."""
    found = of_all_ranks({name: repr(value) for name, value in values.items()})
    for name, first in found[0].items():
        for rank, value in enumerate(theirs[name] for theirs in found):
            if value != first:
                differing = f"rank 0 has {first}, rank {rank} {value}"
                raise ValueError(f"Ranks were given different {name}: {differing}. {advice}")
