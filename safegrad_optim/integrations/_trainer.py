"""What is undocumented of the Trainer (seen in transformers 5.2 and 5.24) and accelerate (1.13 and 1.15)."""

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
