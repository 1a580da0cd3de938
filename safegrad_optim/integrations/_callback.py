"""SafeGradCallback: no unprotected training in the Trainer, and what the steps did in its logs."""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from safegrad_optim.alignment import Alignment, KLAlignment
from safegrad_optim.integrations import _trainer
from safegrad_optim.optimizer import SafeGradOptimizer, UnprotectedStepError
from safegrad_optim.protection import ProtectionCheck

# Fields of SurgeryStats whose means over a logging interval are logged.
_FIELDS = ("cosine", "conflict", "user_norm", "alignment_norm", "final_norm")


class SafeGradCallback(TrainerCallback, ExportableState):
    """Refuse to train unprotected, and add `safegrad/*` metrics to the Trainer's training logs.

    Since the last log: the means over protected steps of cosine, user_norm, alignment_norm and final_norm
    of `SurgeryStats`; conflict_rate, the share of them that conflicted; and alignment_kl, the mean over the
    safety batches drawn, if any. Over the whole run: the numbers of unprotected_steps and of skipped_steps
    (by the fp16 loss scaler); all as if a resumed run had not stopped. It waits for the device at logs and
    checkpoints only.

    With a `ProtectionCheck` also what its last check found since the last log, and once more at the end:
    refusal_kept, of all requests and of each origin, over_refusal and flipped.

    Args:
        check: whether refusals last; with `on_leak="stop"` a leak ends the training.

    Raises:
        ProtectionLostError: there is a leak, and the check's `on_leak` is "raise".
        UnprotectedStepError: when training starts, the Trainer's optimizer is no `SafeGradOptimizer`.
        NotImplementedError: when training starts, the Trainer uses DeepSpeed.
    """

    def __init__(self, check: ProtectionCheck | None = None) -> None:
        self._optimizer: SafeGradOptimizer | None = None
        self._check = check
        self._found: dict[str, float] = {}
        self._before_reporters = False
        self._skipped = 0
        self._clear()

    def add_to(self, trainer: Trainer) -> None:
        """Add the callback to a Trainer, before its reporters, which miss its metrics otherwise.

        `callbacks=[...]` puts it behind them, and so does `restore_callback_states_from_checkpoint=True`.
        """
        _trainer.add_first(trainer, self)
        self._before_reporters = True

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        _trainer.refuse_deepspeed(args)
        optimizer = _trainer.bare_optimizer(kwargs["optimizer"])
        if not isinstance(optimizer, SafeGradOptimizer):
            raise UnprotectedStepError(
                f"The Trainer's optimizer is a {type(optimizer).__name__}, expected a SafeGradOptimizer. "
                "Pass optimizers=(SafeGradOptimizer(...), None), or what safegrad_optimizer() returns."
            )
        _trainer.warn_of_clipping(args)
        if args.report_to and not self._before_reporters:
            warnings.warn(
                f"SafeGradCallback comes after the reporters {args.report_to}, which miss its metrics. "
                "Leave it out of callbacks=[...] and call SafeGradCallback().add_to(trainer).",
                stacklevel=2,
            )
        self._optimizer = optimizer
        self._last_stats, self._last_loss = optimizer.stats, _last_loss(optimizer)
        self._clear()
        self._skipped = 0
        # Read here, because the Trainer itself restores a callback only if asked to, as a new object;
        # and set where missing, because it saves only what was in the checkpoint it resumed from.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self._sums = torch.tensor(saved["sums"], dtype=torch.float64)
            self._steps, self._draws, self._skipped = saved["counts"]
            if "check" in saved:
                self._resume_check(saved["check"])

    def _resume_check(self, saved: dict[str, Any]) -> None:
        if self._check is not None:
            self._check.load_state_dict(saved)
            return
        warnings.warn(
            "The interrupted run had a ProtectionCheck, and this one goes on without. Give SafeGradCallback "
            "check=..., and leave out restore_callback_states_from_checkpoint, which makes a new callback.",
            stacklevel=3,
        )

    def on_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        assert self._optimizer is not None
        self._skipped += bool(getattr(kwargs["optimizer"], "step_was_skipped", False))
        stats, loss = self._optimizer.stats, _last_loss(self._optimizer)
        if stats is None or stats is self._last_stats:
            return
        drawn = [] if loss is None or loss is self._last_loss else [loss]
        values = [getattr(stats, field) for field in _FIELDS] + (drawn or [torch.zeros_like(stats.cosine)])
        new = torch.stack([value.to(stats.cosine) for value in values])
        self._draws += len(drawn)
        self._sums = self._sums.to(new) + new
        self._steps += 1
        self._last_stats, self._last_loss = stats, loss

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._check is not None and (found := self._check(state.global_step)) is not None:
            self._found = found.metrics()
            control.should_training_stop |= self._check.should_stop

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self._check is not None:
            found = self._check.judged(state.global_step)
            state.log_history.append({"step": found.step} | _named(found.metrics()))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Evaluations and the summary at the end are logged through here as well.
        logs = kwargs["logs"]
        if "loss" not in logs or self._optimizer is None:
            return
        *sums, losses = self._sums.tolist()
        metrics: dict[str, float] = {}
        if self._steps > 0:
            metrics = {field: value / self._steps for field, value in zip(_FIELDS, sums, strict=True)}
            metrics["conflict_rate"] = metrics.pop("conflict")
        if self._draws > 0:
            is_kl = isinstance(self._optimizer.alignment, KLAlignment)
            metrics["alignment_kl" if is_kl else "alignment_loss"] = losses / self._draws
        metrics["unprotected_steps"] = self._optimizer.counts.unprotected
        metrics["skipped_steps"] = self._skipped
        metrics = _named(metrics | self._found)
        self._found = {}
        logs.update(metrics)
        _trainer.add_to_last_log(state, metrics)
        self._clear()

    def state(self) -> dict[str, Any]:
        """Return what goes into the `trainer_state.json` of a checkpoint."""
        counts = [self._steps, self._draws, self._skipped]
        check = {} if self._check is None else {"check": self._check.state_dict()}
        return {"args": {}, "attributes": {}, "sums": self._sums.tolist(), "counts": counts} | check

    def _clear(self) -> None:
        self._sums = torch.zeros(len(_FIELDS) + 1, dtype=torch.float64)
        self._steps = self._draws = 0


def _named(metrics: dict[str, float]) -> dict[str, float]:
    return {f"safegrad/{name}": value for name, value in metrics.items()}


def _last_loss(optimizer: SafeGradOptimizer) -> Tensor | None:
    return optimizer.alignment.last_loss if isinstance(optimizer.alignment, Alignment) else None
