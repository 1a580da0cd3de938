"""The arms: what is done with the gradient of each training batch."""

from collections.abc import Callable, Iterator

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from benchmarks.poisoned_finetuning.cells import Cell
from benchmarks.poisoned_finetuning.lisa import Proximal
from safegrad_optim import KLAlignment, LossAlignment, SafeGradOptimizer, combine_

__all__ = ["base_optimizer", "steps"]

Batch = dict[str, Tensor]
Step = Callable[[Batch], None]

# Of each ten steps of Lisa five are on safety data, so that it sees as much of it as SafeGrad.
LISA_SWITCH = 5


def base_optimizer(cell: Cell, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer that every arm of a cell steps with."""
    if cell.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=cell.lr, momentum=0.9)
    if cell.optimizer == "muon":
        return torch.optim.Muon(parameters, lr=cell.lr, adjust_lr_fn="match_rms_adamw")
    if cell.optimizer == "schedulefree":
        return AdamWScheduleFree(parameters, lr=cell.lr, warmup_steps=5)
    return torch.optim.AdamW(parameters, lr=cell.lr, foreach=True)


def steps(
    cell: Cell,
    model: nn.Module,
    base: torch.optim.Optimizer,
    user: Iterator[Batch],
    safety: list[Batch],
) -> Iterator[None]:
    """Train one step of the cell's arm for each item taken.

    Args:
        cell: what to do.
        model: the model to train.
        base: an optimizer of its parameters.
        user: training batches, poisoned.
        safety: safety batches.

    Returns:
        An iterator with as many items as `user` has batches; none for the aligned model.
    """
    parameters = [parameter for group in base.param_groups for parameter in group["params"]]
    if cell.arm == "aligned":
        return
    if cell.arm in ("safegrad", "cross-entropy"):
        yield from _protected(cell, model, base, user, safety)
    elif cell.arm in ("weighted", "per-tensor"):
        alignment = KLAlignment(model, safety, positions=cell.positions, seed=cell.seed)
        for batch in user:
            row_loss(model, batch).backward()
            grads = alignment(parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                if cell.arm == "weighted":
                    parameter.grad.add_(grad, alpha=cell.rho)
                else:
                    combine_([parameter.grad], [grad], cell.rho)
            _step(base)
            yield
    elif cell.arm == "lisa":
        yield from _lisa(model, base, parameters, user, safety)
    else:
        order = _cycle(safety)
        for batch in user:
            row_loss(model, batch).backward()
            if cell.arm == "mixed":
                row_loss(model, next(order)).backward()
                torch._foreach_mul_([parameter.grad for parameter in parameters], 0.5)
            _step(base)
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


def _protected(
    cell: Cell, model: nn.Module, base: torch.optim.Optimizer, user: Iterator[Batch], safety: list[Batch]
) -> Iterator[None]:
    alignment: KLAlignment | LossAlignment
    if cell.arm == "safegrad":
        alignment = KLAlignment(model, safety, positions=cell.positions, seed=cell.seed)
    else:
        alignment = LossAlignment(model, safety, seed=cell.seed)
    optimizer = SafeGradOptimizer(base, alignment, rho=cell.rho, refresh_every=cell.refresh_every)
    for batch in user:
        row_loss(model, batch).backward()
        _step(optimizer)
        yield


def _lisa(
    model: nn.Module,
    base: torch.optim.Optimizer,
    parameters: list[Tensor],
    user: Iterator[Batch],
    safety: list[Batch],
) -> Iterator[None]:
    proximal = Proximal(parameters)
    order = _cycle(safety)

    def step(batch: Batch) -> None:
        row_loss(model, batch).backward()
        proximal.add_gradient()
        _step(base)

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


def _cycle(batches: list[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
