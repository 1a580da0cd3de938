"""The wrapper behaves as the optimizer it wraps, also to everything that is built on one."""

import copy
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler, swa_utils

from safegrad_optim import SafeGradOptimizer

SHAPE = (6, 4)


def make_parameters(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(count)]


def set_grads(parameters, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in parameters:
        parameter.grad = torch.randn(SHAPE, generator=generator)


def agreeing(parameters):
    """An alignment gradient without conflict that rho = 0 therefore leaves out."""
    return [parameter.grad * 0.5 if parameter.grad is not None else None for parameter in parameters]


def wrap(base, **options):
    return SafeGradOptimizer(base, **({"alignment": agreeing, "rho": 0.0} | options))


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def train(parameters, optimizer, steps=5, start=0):
    for step in range(start, start + steps):
        set_grads(parameters, step)
        optimizer.step()


# --- special optimizers ---------------------------------------------------------------------------


def test_sparse_adam_steps_on_the_surgery_of_sparse_gradients():
    def run(wrapped):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 3, sparse=True)
        base = torch.optim.SparseAdam(embedding.parameters())
        optimizer = wrap(base) if wrapped else base
        for step in range(3):
            embedding(torch.tensor([step, 4])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return embedding.weight

    assert_same(run(True), run(False))


def test_sparse_adam_moves_the_rows_of_both_gradients():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = SafeGradOptimizer(torch.optim.SparseAdam(embedding.parameters()), rho=1.0)
    embedding(torch.tensor([2])).sum().backward()
    alignment = embedding.weight.grad.clone()
    embedding.weight.grad = None
    embedding(torch.tensor([5])).sum().backward()
    optimizer.set_alignment_grad([alignment])
    optimizer.step()
    moved = (embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [2, 5]


def test_what_cannot_be_wrapped_is_refused():
    parameters = make_parameters()
    with pytest.raises(TypeError, match="LBFGS evaluates its closure several times"):
        SafeGradOptimizer(torch.optim.LBFGS(parameters))
    with pytest.raises(TypeError, match="SafeGradOptimizer already"):
        SafeGradOptimizer(wrap(torch.optim.SGD(parameters)))
    with pytest.raises(TypeError, match=r"a list, expected a torch\.optim\.Optimizer"):
        SafeGradOptimizer(parameters)
    with pytest.raises(ValueError, match="Adam has differentiable=True"):
        SafeGradOptimizer(torch.optim.Adam(parameters, differentiable=True))


# --- what is built on an optimizer ----------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, total_iters=2),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "SWALR": lambda optimizer: swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tried():
    kinds = {kind for kind in vars(lr_scheduler).values() if isinstance(kind, type)}
    kinds |= {kind for kind in vars(swa_utils).values() if isinstance(kind, type)}
    names = {kind.__name__ for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)}
    assert names - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_drive_the_base(kind):
    def run(wrapped, reload):
        parameters = make_parameters()
        base = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        optimizer = wrap(base) if wrapped else base
        scheduler = SCHEDULERS[kind](optimizer)
        rates = []
        for step in range(5):
            if reload and step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            train(parameters, optimizer, 1, start=step)
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            rates.append(base.param_groups[0]["lr"])
        return parameters, rates

    expected = run(wrapped=False, reload=False)
    assert len(set(expected[1])) > 1
    assert_same(run(wrapped=True, reload=False), expected)
    # load_state_dict replaces the groups; accelerate calls it after the scheduler is built.
    assert_same(run(wrapped=True, reload=True), expected)


def test_an_averaged_model_and_its_schedule():
    def run(wrapped):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 6)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = wrap(base) if wrapped else base
        average = swa_utils.AveragedModel(model)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
            scheduler.step()
        return list(average.parameters()), base.param_groups[0]["lr"]

    assert_same(run(wrapped=True), run(wrapped=False))


def test_groups_state_and_defaults_are_the_bases_own():
    parameters = make_parameters()
    base = torch.optim.AdamW(parameters, lr=0.1)
    set_grads(parameters, 0)
    base.step()
    optimizer = wrap(base)
    assert optimizer.state is base.state
    assert len(base.state) == 3  # wrapping has not emptied it
    for name, value in (("param_groups", [{"params": []}]), ("state", {}), ("defaults", {"lr": 1})):
        assert getattr(optimizer, name) is getattr(base, name)
        setattr(optimizer, name, value)
        assert getattr(base, name) is value


def test_parameters_swapped_inside_the_groups_are_followed():
    parameters, replacements = make_parameters(), make_parameters(seed=1)
    base = torch.optim.SGD(parameters, lr=0.1)
    optimizer = wrap(base)
    before = [parameter.detach().clone() for parameter in parameters]
    base.param_groups[0]["params"] = replacements
    train(replacements, optimizer, 1)
    expected = make_parameters(seed=1)
    train(expected, torch.optim.SGD(expected, lr=0.1), 1)
    assert_same(replacements, expected)
    assert_same([parameter.detach() for parameter in parameters], before)


def test_private_marks_of_the_base_do_not_leak():
    base = torch.optim.AdamW(make_parameters(), fused=True)
    base._step_supports_amp_scaling = True
    assert not hasattr(wrap(base), "_step_supports_amp_scaling")


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_unscales_before_surgery_and_skips_overflows_whole(fused):
    def run(scaled):
        parameters = make_parameters()
        pulls = []

        def alignment(current):
            pulls.append(1)
            return [torch.ones_like(parameter) for parameter in current]

        base = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
        optimizer = SafeGradOptimizer(base, alignment)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(4):
            set_grads(parameters, step)
            if step == 2:
                if not scaled:
                    continue
                parameters[0].grad[0, 0] = torch.inf
            for parameter in parameters:
                parameter.grad *= scaler.get_scale() if scaled else 1.0
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        return parameters, len(pulls), optimizer.counts, optimizer.stats.to_dict()

    assert_same(run(scaled=True), run(scaled=False))


def test_deepcopy_and_pickle_also_after_a_scheduler():
    parameters = make_parameters()
    optimizer = SafeGradOptimizer(torch.optim.AdamW(parameters, lr=0.1), agreeing, max_grad_norm=1.0)
    lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_post_hook(lambda *_: None)
    train(parameters, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(optimizer)),
        torch.load(buffer, weights_only=False),
    ]
    train(parameters, optimizer, 2, start=2)
    for twin in copies:
        own = twin.param_groups[0]["params"]
        assert own[0] is not parameters[0]
        train(own, twin, 2, start=2)
        assert_same(own, parameters)
        assert twin.counts == optimizer.counts
        assert twin.register_step_pre_hook(lambda *_: None)


def test_a_failed_deepcopy_does_not_break_other_optimizers():
    class Stubborn:
        def __call__(self, parameters):
            return agreeing(parameters)

        def __deepcopy__(self, memo):
            raise RuntimeError("not to be copied")

    parameters = make_parameters()
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1), alignment=Stubborn())
    with pytest.raises(RuntimeError, match="not to be copied"):
        copy.deepcopy(optimizer)
    train(parameters, optimizer, 1)
    other = make_parameters()
    train(other, wrap(torch.optim.SGD(other, lr=0.1)), 1)
    assert_same(other, parameters)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_distributed_checkpoint_makes_and_sets_the_state_without_a_protected_step(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    parameters = list(model.parameters())
    pulls = []

    def alignment(current):
        pulls.append(1)
        return [torch.ones_like(parameter) for parameter in current]

    optimizer = SafeGradOptimizer(kind(parameters, lr=0.1), alignment)
    optimizer.set_alignment_grad([torch.ones_like(parameter) for parameter in parameters])
    before = [parameter.detach().clone() for parameter in parameters]
    fresh = get_optimizer_state_dict(model, optimizer)
    assert (pulls, optimizer.counts.steps) == ([], 0)
    assert_same([parameter.detach() for parameter in parameters], before)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert pulls == []  # the gradient pushed before is still there
    trained = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(model, optimizer, fresh)
    bare = kind(parameters, lr=0.1)
    for either in (optimizer, bare):
        set_optimizer_state_dict(model, either, copy.deepcopy(trained))
        found = get_optimizer_state_dict(model, either)
        assert_same(found["state"], trained["state"])
        assert found["param_groups"] == trained["param_groups"]


def test_a_step_with_zero_learning_rate_is_protected_all_the_same():
    # Warm-up starts at lr 0: momentum must not take in an unprotected gradient there.
    parameters = make_parameters()
    optimizer = SafeGradOptimizer(
        torch.optim.SGD(parameters, lr=0.0, momentum=0.9),
        lambda current: [-parameter.grad for parameter in current],
    )
    train(parameters, optimizer, 1)
    assert optimizer.counts.conflicts == 1


# --- hooks, closures, groups, names ---------------------------------------------------------------


def test_hooks_fire_once_and_get_the_wrapper():
    parameters = make_parameters()
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1))
    seen = []

    def note(name):
        def hook(subject, *_):
            assert subject is optimizer
            seen.append(name)

        return hook

    for kind in ("step_pre", "step_post", "state_dict_pre", "state_dict_post"):
        getattr(optimizer, f"register_{kind}_hook")(note(kind))
    for kind in ("load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{kind}_hook")(note(kind))
    train(parameters, optimizer, 1)
    assert seen == ["step_pre", "step_post"]
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert seen[2:] == ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]


def test_state_dict_hooks_may_replace_the_state():
    parameters = make_parameters()
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1

    def halve(_, state):
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_closure_runs_once_with_gradients_and_its_loss_is_returned():
    parameters = make_parameters(1)
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = parameters[0].square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    expected = parameters[0].detach() * 0.8
    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    torch.testing.assert_close(parameters[0].detach(), expected)
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    parameters = make_parameters()
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1))
    set_grads(parameters, 0)
    optimizer.zero_grad(set_to_none)
    grads = [parameter.grad for parameter in parameters]
    assert all(grad is None if set_to_none else not grad.any() for grad in grads)


def test_added_groups_are_optimized():
    parameters, added = make_parameters(), make_parameters(1, seed=5)
    optimizer = wrap(torch.optim.SGD(parameters, lr=0.1))
    train(parameters, optimizer, 1)
    optimizer.add_param_group({"params": added, "lr": 0.5})
    before = added[0].detach().clone()
    set_grads([*parameters, *added], 1)
    optimizer.step()
    torch.testing.assert_close(added[0].detach(), before - 0.5 * added[0].grad)


def test_repr_names_wrapper_base_and_alignment():
    text = repr(wrap(torch.optim.AdamW(make_parameters(), lr=0.25), rho=2.0))
    for part in ("SafeGradOptimizer", "rho=2.0", "alignment=function", "AdamW", "lr: 0.25"):
        assert part in text


def test_train_and_eval_reach_a_schedule_free_base():
    class ScheduleFree(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

    base = ScheduleFree(make_parameters(), lr=0.1)
    optimizer = wrap(base)
    optimizer.train()
    assert base.mode == "train"
    optimizer.eval()
    assert base.mode == "eval"
    plain = wrap(torch.optim.SGD(make_parameters(), lr=0.1))
    plain.train()
    plain.eval()


def test_it_is_an_optimizer_and_adds_nothing_to_the_bases_state():
    parameters = make_parameters()
    base = torch.optim.AdamW(parameters)
    optimizer = wrap(base, refresh_every=3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train(parameters, optimizer, 2)
    bare_parameters = make_parameters()
    bare = torch.optim.AdamW(bare_parameters)
    train(bare_parameters, bare, 2)
    assert base.state_dict()["param_groups"] == bare.state_dict()["param_groups"]
    assert [set(state) for state in base.state.values()] == [set(state) for state in bare.state.values()]
