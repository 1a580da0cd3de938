"""An optimizer that is wrapped steps only inside its wrapper, whoever calls it."""

import copy
import pickle

import pytest
import torch

from safegrad_optim import SafeGradOptimizer, UnprotectedStepError

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.1),
}


def wrap(make=OPTIMIZERS["sgd"]):
    weight = torch.nn.Parameter(torch.ones(3))
    base = make([weight])
    return weight, base, SafeGradOptimizer(base, lambda ps: [torch.ones_like(p) for p in ps])


def set_grad(weight):
    weight.grad = torch.full_like(weight, -1.0)


def past(base):
    return pytest.raises(UnprotectedStepError, match=f"{type(base).__name__} was stepped by itself.*unwrap")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_base_refuses_to_step_by_itself_and_changes_nothing(name):
    weight, base, safe = wrap(OPTIMIZERS[name])
    set_grad(weight)
    with past(base):
        base.step()
    assert weight.tolist() == [1.0] * 3
    assert not base.state
    safe.step()
    assert weight.tolist() != [1.0] * 3
    set_grad(weight)
    with past(base):
        base.step()


def test_whoever_steps_the_base():
    weight, base, _ = wrap()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(base)
    scaler.scale((weight * -1.0).sum()).backward()
    with past(base):
        scaler.step(base)
    with past(base):
        base.step(lambda: torch.zeros(()))
    schedule.step()
    with past(base):
        base.step()


def test_steps_that_move_nothing_may_pass():
    weight, base, _ = wrap(OPTIMIZERS["adamw"])
    base.step()
    # As torch.distributed.checkpoint does to make the state.
    base.param_groups[0]["lr"] = 0.0
    weight.grad = torch.zeros_like(weight)
    base.step()
    assert base.state
    assert weight.tolist() == [1.0] * 3


def test_an_error_in_the_base_closes_it_again():
    weight, base, safe = wrap()

    def fail(*_):
        raise RuntimeError("full")

    handle = base.register_step_pre_hook(fail)
    set_grad(weight)
    with pytest.raises(RuntimeError, match="full"):
        safe.step()
    handle.remove()
    with past(base):
        base.step()


def test_unwrapped_it_steps_by_itself():
    weight, base, safe = wrap()
    assert safe.unwrap() is base
    set_grad(weight)
    base.step()
    assert weight.tolist() == pytest.approx([1.1] * 3)


def test_a_second_wrapper_takes_the_place_of_the_first():
    weight, base, first = wrap()
    second = SafeGradOptimizer(base, lambda ps: [torch.ones_like(p) for p in ps])
    set_grad(weight)
    second.step()
    set_grad(weight)
    with past(base):
        first.step()


@pytest.mark.parametrize("through", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_is_guarded_as_well(through):
    weight = torch.nn.Parameter(torch.ones(3))
    safe = through(SafeGradOptimizer(torch.optim.SGD([weight], lr=0.1)))
    copied = safe.param_groups[0]["params"][0]
    set_grad(copied)
    with past(safe.base_optimizer):
        safe.base_optimizer.step()
    safe.set_alignment_grad([torch.ones(3)])
    safe.step()
    assert copied.tolist() != [1.0] * 3
