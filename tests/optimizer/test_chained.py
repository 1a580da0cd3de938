"""Several optimizers that step as one."""

import copy

import pytest
import torch

from safegrad_optim import ChainedOptimizer, KLAlignment, SafeGradOptimizer, combine
from tests.support.models import perturb, safety_rows, tiny_model

IDS = torch.arange(3, 19).reshape(2, 8)


def parts(model):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    own = set(matrices)
    return matrices, [p for p in model.parameters() if p not in own]


def both(model):
    matrices, others = parts(model)
    return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0), torch.optim.AdamW(others, lr=0.01)


def backward(model):
    model(input_ids=IDS, labels=IDS).loss.backward()


def values(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def train(model, *optimizers, steps=3):
    for _ in range(steps):
        backward(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return values(model)


def test_it_steps_as_each_would():
    apart, together = tiny_model(), tiny_model()
    expected = train(apart, *both(apart))
    assert all(map(torch.equal, train(together, ChainedOptimizer(*both(together))), expected))


def test_one_wrapper_makes_one_decision_over_all_and_draws_one_batch():
    model = tiny_model()
    alignment = KLAlignment(model, safety_rows(6), batch_size=2)
    perturb(model, 0.05)
    optimizer = SafeGradOptimizer(ChainedOptimizer(*both(model)), alignment, rho=0.5)
    backward(model)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    users = [parameter.grad.clone() for parameter in order]
    _, expected = combine(users, alignment(order), rho=0.5)
    alignment.load_state_dict(alignment.state_dict() | {"taken": 0})
    optimizer.step()
    torch.testing.assert_close(optimizer.stats.to_dict(), expected.to_dict())
    assert alignment.state_dict()["taken"] == 1
    assert (len(order), optimizer.counts.steps) == (len(list(model.parameters())), 1)


def test_schedulers_reach_all_groups():
    chained = ChainedOptimizer(*both(tiny_model()))
    schedule = torch.optim.lr_scheduler.LambdaLR(chained, lambda step: 0.5**step)
    chained.step()
    schedule.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in chained.optimizers] == [0.01, 0.005]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_goes_on_from_its_state(wrapped):
    def build(model):
        chained = ChainedOptimizer(*both(model))
        if not wrapped:
            return chained
        return SafeGradOptimizer(chained, KLAlignment(aligned(model), safety_rows(4), batch_size=2))

    def aligned(model):
        model.load_state_dict(start)
        return model

    start = tiny_model().state_dict()
    model = tiny_model()
    optimizer = build(model)
    train(model, optimizer, steps=2)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, steps=2)
    again = tiny_model()
    resumed = build(again)
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert all(map(torch.equal, train(again, resumed, steps=2), expected))


def test_a_copy_steps_its_own_parameters():
    model = tiny_model()
    chained = ChainedOptimizer(*both(model))
    copied_model, copied = copy.deepcopy((model, chained))
    before = values(model)
    train(copied_model, copied)
    assert all(map(torch.equal, values(model), before))
    assert not any(map(torch.equal, values(copied_model), before))


def test_what_cannot_be_chained_is_refused():
    model = tiny_model()
    muon, adam = both(model)
    with pytest.raises(ValueError, match="no optimizers"):
        ChainedOptimizer()
    with pytest.raises(ValueError, match=r"\d+ parameters are in two"):
        ChainedOptimizer(adam, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="A list was given"):
        ChainedOptimizer([muon, adam])
    with pytest.raises(NotImplementedError, match=r"one of \.optimizers"):
        ChainedOptimizer(muon, adam).add_param_group({"params": []})
