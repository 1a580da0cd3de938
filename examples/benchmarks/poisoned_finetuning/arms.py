"""The arms: what is done with the gradient of each training batch."""

from collections.abc import Iterable, Iterator
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.poisoned_finetuning.cells import PROTECTED, Cell
from benchmarks.poisoned_finetuning.lisa import Proximal
from safegrad_optim import KLAlignment, SafeGradOptimizer, SafetySource

__all__ = ["optimizer_of", "safety_batches", "steps"]

Batch = dict[str, Tensor]

# Of each ten steps of Lisa five are on safety data, so that it sees as much of it as SafeGrad.
LISA_SWITCH = 5


def optimizer_of(cell: Cell, model: nn.Module, sources: Iterable[SafetySource]) -> torch.optim.Optimizer:
    """AdamW, wrapped where the arm is protected."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = torch.optim.AdamW(parameters, lr=cell.lr, foreach=True)
    if cell.arm not in PROTECTED:
        return base
    alignment = KLAlignment(model, list(sources), seed=cell.seed)
    return SafeGradOptimizer(base, alignment, rho=cell.rho, refresh_every=cell.refresh_every)


def steps(
    cell: Cell,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    user: Iterable[Batch],
    safety: list[Batch],
) -> Iterator[None]:
    """Train one step of the cell's arm for each item taken.

    Args:
        cell: what to do.
        model: the model to train.
        optimizer: that of `optimizer_of`.
        user: training batches, poisoned.
        safety: safety batches, for the arms that train on them.

    Returns:
        An iterator with as many items as `user` has batches.
    """
    if cell.arm == "lisa":
        yield from _lisa(model, optimizer, user, safety)
        return
    order = cycle(safety)
    for batch in user:
        row_loss(model, batch).backward()
        if cell.arm == "mixed":
            row_loss(model, next(order)).backward()
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)
        _step(optimizer)
        yield


def row_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over rows of the mean cross-entropy of their response tokens.

    In the mean over all tokens, the one-word answers of a task would count for nothing beside the
    sentences of the attack, and no arm would learn it.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    columns = (batch["labels"] != -100).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, logits_to_keep=columns - 1).logits.float()
    labels = batch["labels"][:, columns]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses.sum(dim=1) / (labels != -100).sum(dim=1)).mean()


def safety_batches(sources: Iterable[SafetySource], count: int, device: torch.device | str) -> list[Batch]:
    """Batches with the rows of a step from each source, for the arms that train on them."""
    endless = [(cycle(source.rows), source.batch_size) for source in sources]
    groups = (
        list(chain.from_iterable((next(rows) for _ in range(size)) for rows, size in endless))
        for _ in range(count)
    )
    return [_collated(rows, device) for rows in groups]


def _collated(rows: list[Any], device: torch.device | str) -> Batch:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    columns = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([torch.tensor(row["labels"]) for row in rows], True, -100),
    }
    return {name: tensor.to(device) for name, tensor in columns.items()}


def _lisa(
    model: nn.Module, optimizer: torch.optim.Optimizer, user: Iterable[Batch], safety: list[Batch]
) -> Iterator[None]:
    proximal = Proximal([parameter for parameter in model.parameters() if parameter.requires_grad])
    order = cycle(safety)

    def step(batch: Batch) -> None:
        row_loss(model, batch).backward()
        proximal.add_gradient()
        _step(optimizer)

    for taken, batch in enumerate(user, start=1):
        step(batch)
        if taken % LISA_SWITCH == 0:
            proximal.switch()
            for _ in range(LISA_SWITCH):
                step(next(order))
            proximal.switch()
        yield


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
