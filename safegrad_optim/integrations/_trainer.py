"""What is undocumented of the Trainer (seen in transformers 5.2 and 5.24) and accelerate (1.13 and 1.15)."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments


def base_optimizer(model: nn.Module, args: TrainingArguments) -> Optimizer:
    """Return the optimizer that a Trainer would make of its arguments, with its own parameter groups."""
    # A Trainer with no more than its create_optimizer reads; it makes none itself without a dataset.
    trainer = Trainer.__new__(Trainer)
    trainer.model, trainer.args = model, args
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    return trainer.create_optimizer()


def wrap_optimizer(trainer: Any, wrap: Callable[[Optimizer, nn.Module], Optimizer]) -> None:
    """Have a Trainer wrap whatever optimizer it makes, or was given."""
    create = trainer.create_optimizer

    def create_optimizer(*given: nn.Module) -> Optimizer:
        base = create(*given)
        trainer.optimizer = wrap(base, given[0] if given else trainer.model)
        return trainer.optimizer  # type: ignore[no-any-return]

    trainer.create_optimizer = create_optimizer


def has_factory(trainer: Any, factory: type) -> bool:
    """Return whether a Trainer was given this factory of optimizers."""
    kind, _ = trainer.optimizer_cls_and_kwargs or (None, {})
    return kind is factory


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return what accelerate has wrapped, or the optimizer itself where it has not."""
    inside: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inside


def add_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Add a callback before all others; `Trainer.add_callback` adds behind them."""
    trainer.callback_handler.callbacks.insert(0, callback)


def add_to_last_log(state: TrainerState, metrics: dict[str, float]) -> None:
    """Add to what `on_log` was called with in the history: the Trainer has put a copy there before."""
    state.log_history[-1].update(metrics)


def refuse_deepspeed(args: TrainingArguments) -> None:
    if args.deepspeed_plugin is not None:
        raise NotImplementedError(
            "The Trainer uses DeepSpeed, whose ZeRO keeps gradients where no optimizer wrapper sees them. "
            "Leave out deepspeed= (and `use_deepspeed` of accelerate's config); use DDP or FSDP2 instead."
        )


def warn_of_clipping(args: TrainingArguments) -> None:
    if args.max_grad_norm > 0:
        warnings.warn(
            f"max_grad_norm={args.max_grad_norm} of the TrainingArguments clips the user gradient alone. Set "
            "max_grad_norm=0 there, and give it to SafeGradOptimizer or safegrad_optimizer instead.",
            stacklevel=1,  # One place, so that Python shows it once.
        )
