"""A raw training loop, stopped and resumed from disk, is the uninterrupted one bit for bit."""

import pytest
import torch

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer
from tests.support.models import safety_rows, tiny_model, tiny_peft, trainable

STEPS = 10


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, 60, (4, 8), generator=generator)


class Run:
    """A training script: model, optimizer, and the checkpoint of both."""

    def __init__(self, make, refresh_every=1, load=None, seed=0, reference=None):
        self.model = make(dtype=torch.float32)
        checkpoint = None if load is None else torch.load(load, weights_only=True)
        if checkpoint is not None and reference is not None and reference.resumed:
            self.model.load_state_dict(checkpoint["model"])
        alignment = KLAlignment(self.model, safety_rows(6), batch_size=2, seed=seed, reference=reference)
        base = torch.optim.AdamW(trainable(self.model), lr=0.01)
        self.optimizer = SafeGradOptimizer(base, alignment, refresh_every=refresh_every)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.stats = []

    def steps(self, start, end):
        for step in range(start, end):
            self.model(input_ids=batch(step), labels=batch(step)).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.stats.append(self.optimizer.stats.to_dict())
        return self

    def save(self, path):
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)


def assert_same_end(resumed, uninterrupted):
    assert resumed.stats == uninterrupted.stats[-len(resumed.stats) :]
    for left, right in zip(trainable(resumed.model), trainable(uninterrupted.model), strict=True):
        assert torch.equal(left, right)
    assert resumed.optimizer.counts == uninterrupted.optimizer.counts


@pytest.mark.parametrize("make", [tiny_peft, tiny_model])
@pytest.mark.parametrize("stop", [4, 6])
@pytest.mark.parametrize("refresh_every", [1, 4])
def test_killed_and_resumed_from_the_aligned_model(make, stop, refresh_every, tmp_path):
    uninterrupted = Run(make, refresh_every).steps(0, STEPS)
    Run(make, refresh_every).steps(0, stop).save(tmp_path / "checkpoint.pt")
    resumed = Run(make, refresh_every, load=tmp_path / "checkpoint.pt").steps(stop, STEPS)
    assert_same_end(resumed, uninterrupted)


@pytest.mark.parametrize("make", [tiny_peft, tiny_model])
def test_killed_and_resumed_from_the_fine_tuned_model(make, tmp_path):
    file = tmp_path / "reference.safetensors"
    options = {"refresh_every": 4, "reference": Reference(file=file)}
    uninterrupted = Run(make, **options).steps(0, STEPS)
    Run(make, **options).steps(0, 6).save(tmp_path / "checkpoint.pt")
    options["reference"] = Reference(file=file, resumed=True)
    resumed = Run(make, load=tmp_path / "checkpoint.pt", **options).steps(6, STEPS)
    assert_same_end(resumed, uninterrupted)


def test_a_reference_taken_from_the_fine_tuned_model_is_refused(tmp_path):
    run = Run(tiny_model).steps(0, 3)
    # The script reads its model from the checkpoint and takes it for the aligned one.
    model = tiny_model(dtype=torch.float32)
    model.load_state_dict(run.model.state_dict())
    drifted = SafeGradOptimizer(
        torch.optim.AdamW(trainable(model), lr=0.01), KLAlignment(model, safety_rows(6), batch_size=2)
    )
    before = drifted.state_dict()
    with pytest.raises(ValueError, match=r"fine-tuned before KLAlignment was.*file=.*resumed=True"):
        drifted.load_state_dict(run.optimizer.state_dict())
    assert drifted.state_dict() == before


def test_a_fine_tuned_model_without_its_saved_reference_is_refused():
    with pytest.raises(ValueError, match=r"resumed=True.*cache file is not given"):
        KLAlignment(tiny_model(), safety_rows(), reference=Reference(resumed=True))


def test_another_order_of_safety_batches_is_refused():
    run = Run(tiny_peft)
    with pytest.raises(ValueError, match="seed 0, this one 1"):
        Run(tiny_peft, seed=1).optimizer.load_state_dict(run.optimizer.state_dict())


def test_a_saved_alignment_gradient_of_other_parameters_is_refused():
    run = Run(tiny_peft, refresh_every=4).steps(0, 2)
    other = Run(tiny_peft, refresh_every=4)
    trainable(other.model)[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"of 8 parameters.*has 7 trainable"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert not other.optimizer.base_optimizer.state


def test_where_the_base_refuses_its_state_ours_is_as_it_was():
    run, other = (Run(tiny_peft).steps(0, steps) for steps in (2, 3))
    state = other.optimizer.state_dict()
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    counts = run.optimizer.counts
    with pytest.raises(ValueError, match="loaded state dict"):
        run.optimizer.load_state_dict(state)
    assert run.optimizer.counts == counts
    uninterrupted = Run(tiny_peft).steps(0, 4)
    assert_same_end(run.steps(2, 4), uninterrupted)
