"""Every optimizer and option in PyTorch's own test database behaves the same inside the wrapper."""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

from safegrad_optim import SafeGradOptimizer, combine

STEPS = 4
ENTRIES = {entry.name: entry for entry in optim_db}
DENSE = [
    entry for entry in optim_db if not entry.step_requires_closure and not entry.only_supports_sparse_grads
]
SPARSE = [entry for entry in optim_db if entry.supports_sparse or entry.only_supports_sparse_grads]


def implementations(entry):
    """The ways of computing that an optimizer has on a CPU."""
    ways = [{}]
    if "foreach" in entry.supported_impls:
        ways += [{"foreach": True}, {"foreach": False}]
    if "cpu" in entry.supports_fused_on:
        ways += [{"fused": True}]
    return ways


def configurations():
    """One test parameter for each optimizer, options and implementation of the database."""
    return [
        pytest.param(entry, options.kwargs | way, id=f"{entry.name}-{options.desc}-{way or 'default'}")
        for entry in DENSE
        for options in entry.optim_inputs_func(device="cpu")
        for way in implementations(entry)
        if not options.kwargs.get("maximize")
    ]


def make_parameters(entry, dtype=torch.float32):
    # Muon takes matrices only.
    shapes = [(6, 4), (3, 2)] if entry.name == "Muon" else [(6, 4), (5,), ()]
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def random_grads(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


def build(entry, parameters, kwargs):
    # The database hands out the same tensor as lr each time, and some optimizers keep it.
    return entry.optim_cls(parameters, **copy.deepcopy(kwargs))


def agreeing(parameters):
    """An alignment gradient without conflict, which rho = 0 therefore leaves out."""
    return [0.5 * parameter.grad for parameter in parameters]


def train(parameters, optimizer, start=0):
    for step in range(start, start + STEPS):
        for parameter, grad in zip(parameters, random_grads(parameters, step), strict=True):
            parameter.grad = grad
        optimizer.step()


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def base_state(optimizer):
    """State and groups without what the wrapper adds: a key at the top, and numbers in the first group."""
    found = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if not key.startswith("safegrad_")}
        for group in found["param_groups"]
    ]
    return {"state": found["state"], "param_groups": groups}


def assert_same_state(left, right):
    assert_same(base_state(left), base_state(right))


def test_the_database_has_every_optimizer_of_torch():
    kinds = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)}
    optimizers = {kind.__name__ for kind in kinds if issubclass(kind, torch.optim.Optimizer)}
    assert optimizers - {"Optimizer"} == set(ENTRIES)


@pytest.mark.parametrize(("entry", "kwargs"), configurations())
def test_without_conflict_and_rho_every_optimizer_is_bit_identical_to_itself(entry, kwargs):
    wrapped_parameters, bare_parameters = make_parameters(entry), make_parameters(entry)
    wrapped = SafeGradOptimizer(build(entry, wrapped_parameters, kwargs), agreeing, rho=0.0)
    bare = build(entry, bare_parameters, kwargs)
    train(wrapped_parameters, wrapped)
    train(bare_parameters, bare)
    assert wrapped.counts == (STEPS, 0, 0, 0)
    assert_same(wrapped_parameters, bare_parameters)
    assert_same_state(wrapped, bare)
    # A state goes from either to the other, and training on from there is the same too.
    wrapped_state, bare_state = copy.deepcopy((wrapped.state_dict(), bare.state_dict()))
    wrapped.load_state_dict(bare_state)
    bare.load_state_dict(wrapped_state)
    train(wrapped_parameters, wrapped, start=STEPS)
    train(bare_parameters, bare, start=STEPS)
    assert_same(wrapped_parameters, bare_parameters)
    assert_same_state(wrapped, bare)


@pytest.mark.parametrize(("entry", "kwargs"), configurations())
def test_every_optimizer_steps_on_the_result_of_surgery(entry, kwargs):
    wrapped_parameters, bare_parameters = make_parameters(entry), make_parameters(entry)
    wrapped = SafeGradOptimizer(build(entry, wrapped_parameters, kwargs))
    bare = build(entry, bare_parameters, kwargs)
    for step in range(STEPS):
        user = random_grads(wrapped_parameters, step)
        # Half against the user gradient, so that every step is a conflict.
        other = random_grads(wrapped_parameters, 100 + step)
        alignment = [0.3 * right - left for left, right in zip(user, other, strict=True)]
        final, stats = combine(user, alignment, rho=1.0)
        assert stats.conflict
        for parameter, grad in zip(wrapped_parameters, user, strict=True):
            parameter.grad = grad
        for parameter, grad in zip(bare_parameters, final, strict=True):
            parameter.grad = grad
        wrapped.set_alignment_grad(alignment)
        wrapped.step()
        bare.step()
    assert wrapped.counts == (STEPS, STEPS, 0, 0)
    assert_same(wrapped_parameters, bare_parameters)
    assert_same_state(wrapped, bare)


@pytest.mark.parametrize("entry", [e for e in DENSE if e.supports_complex], ids=lambda entry: entry.name)
def test_complex_parameters(entry):
    wrapped_parameters, bare_parameters = (make_parameters(entry, torch.complex64) for _ in range(2))
    wrapped = SafeGradOptimizer(build(entry, wrapped_parameters, {}), agreeing, rho=0.0)
    bare = build(entry, bare_parameters, {})
    train(wrapped_parameters, wrapped)
    train(bare_parameters, bare)
    assert wrapped.counts.conflicts == 0
    assert_same(wrapped_parameters, bare_parameters)
    assert_same_state(wrapped, bare)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # Adagrad's
@pytest.mark.parametrize("entry", SPARSE, ids=lambda entry: entry.name)
def test_sparse_gradients(entry):
    kwargs = entry.metadata_for_sparse[0]

    def run(wrapped):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 3, sparse=True)
        optimizer = build(entry, list(embedding.parameters()), kwargs)
        if wrapped:
            optimizer = SafeGradOptimizer(optimizer, agreeing, rho=0.0)
        for step in range(STEPS):
            embedding(torch.tensor([step, 4, step])).square().sum().backward()
            assert embedding.weight.grad.is_sparse
            optimizer.step()
            optimizer.zero_grad()
        return embedding.weight, base_state(optimizer)

    assert_same(run(wrapped=True), run(wrapped=False))


@pytest.mark.parametrize("entry", [e for e in DENSE if e.has_capturable_arg], ids=lambda entry: entry.name)
def test_capturable_fails_on_a_cpu_as_it_does_without_the_wrapper(entry):
    messages = []
    for wrapped in (False, True):
        parameters = make_parameters(entry)
        optimizer = build(entry, parameters, {"capturable": True})
        if wrapped:
            optimizer = SafeGradOptimizer(optimizer, agreeing, rho=0.0)
        with pytest.raises(AssertionError) as caught:
            train(parameters, optimizer)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [e for e in optim_db if e.step_requires_closure], ids=lambda e: e.name)
def test_optimizers_that_need_a_closure_are_refused(entry):
    for options in entry.optim_inputs_func(device="cpu"):
        with pytest.raises(TypeError, match=f"{entry.name} evaluates its closure several times"):
            SafeGradOptimizer(build(entry, make_parameters(entry), options.kwargs))


@pytest.mark.parametrize(
    "entry", [e for e in optim_db if "differentiable" in e.supported_impls], ids=lambda e: e.name
)
def test_differentiable_optimizers_are_refused(entry):
    for options in entry.optim_inputs_func(device="cpu"):
        base = build(entry, make_parameters(entry), options.kwargs | {"differentiable": True})
        with pytest.raises(ValueError, match=f"{entry.name} has differentiable=True"):
            SafeGradOptimizer(base)


@pytest.mark.parametrize(
    "entry",
    [e for e in DENSE if any("maximize" in o.kwargs for o in e.optim_inputs_func(device="cpu"))],
    ids=lambda entry: entry.name,
)
def test_maximizing_optimizers_are_refused(entry):
    base = build(entry, make_parameters(entry), {"maximize": True})
    with pytest.raises(ValueError, match=f"{entry.name} has maximize=True"):
        SafeGradOptimizer(base)


def test_a_group_that_is_made_to_maximize_later_is_refused():
    parameters = [torch.nn.Parameter(torch.ones(3))]
    optimizer = SafeGradOptimizer(torch.optim.SGD(parameters, lr=0.1), agreeing)
    state = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, maximize=True).state_dict()
    optimizer.load_state_dict(state)
    parameters[0].grad = torch.ones(3)
    with pytest.raises(ValueError, match="Group 0 of SGD has maximize=True"):
        optimizer.step()
    assert torch.equal(parameters[0], torch.ones(3))
