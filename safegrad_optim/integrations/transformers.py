"""SafeGrad in the Hugging Face Trainer and its subclasses, such as TRL's: optimizer and metrics.

A Trainer that is there, whichever class it is of:

protect_trainer(Trainer(model, args, ...), safety_batches)

or through its own arguments, where it has them:

trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=safegrad_optimizer(args, safety_batches))
SafeGradCallback().add_to(trainer)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from safegrad_optim.alignment import KLAlignment
from safegrad_optim.batches import SafetyBatches, SafetySource
from safegrad_optim.integrations import _trainer
from safegrad_optim.integrations._callback import SafeGradCallback
from safegrad_optim.optimizer import SafeGradOptimizer
from safegrad_optim.protection import ProtectionCheck

__all__ = ["SafeGradCallback", "SafeGradFactory", "protect_trainer", "safegrad_optimizer"]


def protect_trainer(
    trainer: Trainer,
    safety_batches: SafetyBatches | Iterable[SafetySource],
    *,
    rho: float = 1.0,
    refresh_every: int = 1,
    max_grad_norm: float | None = None,
    check: ProtectionCheck | None = None,
    **alignment_options: Any,
) -> SafeGradCallback:
    """Have a Trainer, of any class, train with a `SafeGradOptimizer` around the optimizer that it makes.

    SafeGradOptimizer(the Trainer's own optimizer, KLAlignment(its model, safety_batches))

    Parameter groups and optimizer are those of the Trainer's class, which may choose them for itself, and an
    optimizer that it was given is wrapped too. Works before training only. On resuming see
    `safegrad_optimizer`.

    Args:
        trainer: not training yet.
        safety_batches: as `KLAlignment` takes them.
        rho, refresh_every: as `SafeGradOptimizer` takes them.
        max_grad_norm: clip the final gradient to this norm; set `args.max_grad_norm=0` with it.
        check: whether refusals last, see `SafeGradCallback`.
        alignment_options: keyword arguments of `KLAlignment`; `autocast_dtype` follows the arguments.

    Returns:
        The callback that it adds, before all others.

    Raises:
        ValueError, NotImplementedError: as `safegrad_optimizer`.
        TypeError: the Trainer has an optimizer of SafeGrad's already.
    """
    options = {"autocast_dtype": _checked_autocast(trainer.args)} | alignment_options
    if _trainer.has_factory(trainer, SafeGradFactory):
        raise TypeError("The Trainer has a safegrad_optimizer() already. Leave that out.")

    def wrap(base: Optimizer, model: nn.Module) -> SafeGradOptimizer:
        if isinstance(base, SafeGradOptimizer):
            return base
        alignment = KLAlignment(model, safety_batches, **options)
        return SafeGradOptimizer(
            base, alignment, rho=rho, refresh_every=refresh_every, max_grad_norm=max_grad_norm
        )

    _trainer.wrap_optimizer(trainer, wrap)
    callback = SafeGradCallback(check)
    callback.add_to(trainer)
    return callback


def safegrad_optimizer(
    args: TrainingArguments,
    safety_batches: SafetyBatches,
    *,
    rho: float = 1.0,
    refresh_every: int = 1,
    max_grad_norm: float | None = None,
    **alignment_options: Any,
) -> tuple[type["SafeGradFactory"], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes to train with a `SafeGradOptimizer`.

    SafeGradOptimizer(the optimizer that `args` describe, KLAlignment(the Trainer's model, safety_batches))

    The Trainer builds it when training starts. When it resumes, it has loaded the fine-tuned weights by then:
    pass `reference=Reference(resumed=True)`, and, without PEFT adapters, with the `file` of the original run.
    Under FSDP2 it loads them later: pass neither.

    Parameter groups are those of `Trainer` itself: for a subclass that chooses others use `protect_trainer`.

    Args:
        args: the Trainer's arguments; `optim`, `learning_rate` and the like make the base optimizer.
        safety_batches: as `KLAlignment` takes them.
        rho, refresh_every: as `SafeGradOptimizer` takes them.
        max_grad_norm: clip the final gradient to this norm; set `args.max_grad_norm=0` with it.
        alignment_options: keyword arguments of `KLAlignment`; `autocast_dtype` follows `args`.

    Raises:
        ValueError: `args.optim` steps during the backward pass, where there is no gradient to operate on.
        NotImplementedError: the Trainer uses DeepSpeed.
    """
    autocast_dtype = _checked_autocast(args)
    return SafeGradFactory, {
        "args": args,
        "safety_batches": safety_batches,
        "options": {"rho": rho, "refresh_every": refresh_every, "max_grad_norm": max_grad_norm},
        "alignment_options": {"autocast_dtype": autocast_dtype} | alignment_options,
    }


class SafeGradFactory:
    """What the Trainer calls with its model to get its optimizer; made by `safegrad_optimizer`."""

    def __call__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        safety_batches: SafetyBatches,
        options: dict[str, Any],
        alignment_options: dict[str, Any],
    ) -> SafeGradOptimizer:
        alignment = KLAlignment(model, safety_batches, **alignment_options)
        return SafeGradOptimizer(_trainer.base_optimizer(model, args), alignment, **options)


def _checked_autocast(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of a Trainer's autocast, if its arguments leave a gradient to operate on."""
    _trainer.refuse_deepspeed(args)
    name = OptimizerNames(args.optim).value
    if "layerwise" in name or "lomo" in name:
        raise ValueError(
            f"optim={name!r} updates each layer during the backward pass, before there is a whole gradient "
            "to operate on. Use one that steps afterwards, such as optim='adamw_torch'."
        )
    _trainer.warn_of_clipping(args)
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
