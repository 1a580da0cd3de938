"""A raw accelerate loop: prepare, accumulate, clip, mixed precision, and a run that is resumed."""

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from safegrad_optim import KLAlignment, SafeGradOptimizer
from tests.support.models import padded, safety_rows, tiny_peft, trainable

DTYPES = {"no": None, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def fresh_state():
    # accelerate keeps its settings for the whole process.
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Run:
    """The user's script; `safe` is the one line that is changed."""

    def __init__(
        self, folder, *, safe=True, precision="no", accumulation=2, rho=1.0, every=1, early=False, rows=48
    ):
        AcceleratorState._reset_state(True)
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            mixed_precision=precision,
            gradient_accumulation_steps=accumulation,
            project_dir=folder,
        )
        model = tiny_peft(torch.float32)
        if early:  # as on a GPU, where the alignment needs the model in its place
            model = self.accelerator.prepare(model)
        optimizer = self.base = torch.optim.AdamW(trainable(model), lr=0.02)
        if safe:
            alignment = self.alignment = KLAlignment(
                model, safety_rows(6), batch_size=2, autocast_dtype=DTYPES[precision]
            )
            optimizer = SafeGradOptimizer(self.base, alignment, rho=rho, refresh_every=every)
        self.bare = optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        loader = torch.utils.data.DataLoader(safety_rows(rows, seed=5), batch_size=2, collate_fn=padded)
        self.model, self.optimizer, self.loader, self.scheduler = (
            (model, *self.accelerator.prepare(optimizer, loader, scheduler))
            if early
            else self.accelerator.prepare(model, optimizer, loader, scheduler)
        )

    def train(self, steps, *, skip=0, clip=None):
        """Take so many optimizer steps, from micro-batch `skip` on; return the learning rates."""
        rates, losses = [], []
        self.model.train()
        for batch in self.accelerator.skip_first_batches(self.loader, skip):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch, use_cache=False).loss
                self.accelerator.backward(loss)
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
            if self.accelerator.sync_gradients:
                rates.append(self.base.param_groups[0]["lr"])
            if len(rates) == steps:
                break
        return rates, losses

    def values(self):
        return [parameter.detach().clone() for parameter in trainable(self.model)]


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_protected_and_the_schedule_reaches_the_base(precision, accumulation, tmp_path):
    run = Run(tmp_path, precision=precision, accumulation=accumulation)
    rates, _ = run.train(4)
    assert rates == pytest.approx([0.02 * 0.9**step for step in range(1, 5)])
    assert run.bare.counts.steps == 4
    assert run.bare.counts.negligible == 1
    assert run.bare.counts.unprotected == 0
    assert run.alignment.state_dict()["taken"] == 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_without_rho_or_conflict_the_loop_is_the_bare_one(precision, tmp_path):
    safe, plain = (Run(tmp_path, safe=safe, precision=precision) for safe in (True, False))
    safe.bare.alignment = lambda parameters: [0.5 * parameter.grad for parameter in parameters]
    safe.bare.rho = 0.0
    assert safe.train(4, clip=0.5) == plain.train(4, clip=0.5)
    assert_same(safe.values(), plain.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_alignment_may_be_built_before_or_after_the_model_is_prepared(precision, tmp_path):
    late, early = (Run(tmp_path, early=early, precision=precision) for early in (False, True))
    assert late.train(4) == early.train(4)
    assert_same(late.values(), early.values())
    assert late.bare.counts == early.bare.counts


def test_a_larger_weight_keeps_the_model_closer(tmp_path):
    def divergence(rho):
        run = Run(tmp_path, rho=rho)
        run.train(10)
        run.alignment(trainable(run.model))
        return float(run.alignment.last_loss)

    assert divergence(50.0) < 0.7 * divergence(0.0)


def test_clipping_is_of_the_user_gradient_once_all_micro_batches_are_in(tmp_path):
    run = Run(tmp_path)
    run.train(3, clip=0.01)
    assert float(run.bare.stats.user_norm) == pytest.approx(0.01, rel=1e-3)
    assert float(run.bare.stats.alignment_norm) > 0.01


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(precision, tmp_path):
    # Step 6 is the second of four that one alignment gradient serves.
    run = Run(tmp_path, precision=precision, every=4)
    run.train(6)
    run.accelerator.save_state(tmp_path / "state")
    expected = run.train(6, skip=12)

    resumed = Run(tmp_path, precision=precision, every=4)
    resumed.accelerator.load_state(tmp_path / "state")
    assert resumed.bare.counts.steps == 6
    assert resumed.train(6, skip=12) == expected
    assert_same(resumed.values(), run.values())
    assert resumed.bare.counts == run.bare.counts
    assert resumed.alignment.state_dict() == run.alignment.state_dict()
