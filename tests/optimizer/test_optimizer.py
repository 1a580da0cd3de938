"""What a step does: surgery, pulled and pushed gradients, refusals that change nothing."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from safegrad_optim import SafeGradOptimizer, UnprotectedStepError
from tests.support import oracle

SHAPES = [(4, 3), (3,), (2, 2)]


def make_parameters(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]


def random_grads(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def set_grads(parameters, seed):
    for parameter, grad in zip(parameters, random_grads(seed), strict=True):
        parameter.grad = grad


def make(alignment=None, base=torch.optim.Adam, **options):
    parameters = make_parameters()
    return parameters, SafeGradOptimizer(base(parameters, lr=0.1), alignment, **options)


def snapshot(parameters, optimizer):
    return copy.deepcopy(
        (
            [parameter.detach().clone() for parameter in parameters],
            [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters],
            optimizer.state_dict(),
        )
    )


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


class Pulls:
    """An alignment that gives another gradient at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, parameters):
        self.calls += 1
        return random_grads(1000 + self.calls)


# --- surgery inside the step ----------------------------------------------------------------------


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
def test_steps_are_those_of_the_base_on_the_oracles_gradient(push, rho):
    pulls = Pulls()
    parameters, optimizer = make(None if push else pulls, rho=rho)
    expected_parameters = make_parameters()
    base = torch.optim.Adam(expected_parameters, lr=0.1)
    conflicts = 0
    for step in range(6):
        set_grads(parameters, step)
        alignment = random_grads(1001 + step)
        if push:
            optimizer.set_alignment_grad(alignment)
        final, decided = oracle.surgery(random_grads(step), alignment, rho)
        conflicts += decided["conflict"]
        optimizer.step()
        for parameter, grad in zip(expected_parameters, final, strict=True):
            parameter.grad = grad.reshape(parameter.shape)
        base.step()
        for found, expected in zip(parameters, expected_parameters, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert optimizer.stats.to_dict()["final_norm"] == pytest.approx(decided["final_norm"], rel=1e-10)
    assert 0 < conflicts < 6
    assert optimizer.counts == (6, conflicts, 0, 0)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_is_of_the_final_gradient(max_norm):
    parameters, optimizer = make(Pulls(), base=torch.optim.SGD, max_grad_norm=max_norm)
    set_grads(parameters, 0)
    final, decided = oracle.surgery(random_grads(0), random_grads(1001))
    expected = make_parameters()
    for parameter, grad in zip(expected, final, strict=True):
        parameter.grad = grad.reshape(parameter.shape)
    torch.nn.utils.clip_grad_norm_(expected, max_norm)
    optimizer.step()
    for left, right in zip(parameters, expected, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-6, atol=1e-12)
    assert float(optimizer.stats.final_norm) == pytest.approx(decided["final_norm"])


def test_gradients_accumulated_over_micro_batches_are_operated_on_once():
    def run(parts):
        parameters, optimizer = make(Pulls())
        for part in range(parts):
            for parameter, grad in zip(parameters, random_grads(7), strict=True):
                share = grad / parts
                parameter.grad = share if part == 0 else parameter.grad + share
        optimizer.step()
        return parameters

    for whole, accumulated in zip(run(1), run(4), strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=1e-12, atol=1e-14)


def test_missing_gradients_stay_missing_or_become_the_alignment_gradient():
    parameters, optimizer = make(base=torch.optim.AdamW, rho=0.5)
    before = [parameter.detach().clone() for parameter in parameters]
    grads = random_grads(0)
    parameters[0].grad = grads[0]
    optimizer.set_alignment_grad([None, None, grads[2]])
    optimizer.step()
    assert parameters[1].grad is None
    assert torch.equal(parameters[1], before[1])  # weight decay has left it alone
    torch.testing.assert_close(parameters[2].grad, 0.5 * grads[2])


def test_one_host_read_a_step_and_statistics_stay_on_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    parameters, optimizer = make(Pulls(), base=torch.optim.SGD, max_grad_norm=1.0)
    set_grads(parameters, 0)
    tolists = []
    original = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, Reads() as reads:
        patch.setattr(torch.Tensor, "tolist", lambda self: tolists.append(1) or original(self))
        optimizer.step()
    assert reads.count == 0
    assert len(tolists) == 1
    assert all(isinstance(value, torch.Tensor) for value in optimizer.stats)


# --- pulling and pushing --------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "calls"), [(1, 7), (3, 3), (100, 1)])
def test_a_pulled_gradient_serves_as_many_steps_as_asked(every, calls):
    pulls = Pulls()
    parameters, optimizer = make(pulls, refresh_every=every)
    expected, reference = make()
    for step in range(7):
        set_grads(parameters, step)
        optimizer.step()
        set_grads(expected, step)
        reference.set_alignment_grad(random_grads(1001 + step // every))
        reference.step()
    assert pulls.calls == calls
    assert_same(parameters, expected)


def test_a_pulled_gradient_is_dropped_when_the_run_changes():
    pulls = Pulls()
    parameters, optimizer = make(pulls, refresh_every=100)

    def step():
        set_grads(parameters, 0)
        optimizer.step()
        return pulls.calls

    assert [step(), step()] == [1, 1]
    optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    assert [step(), step()] == [2, 2]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer.alignment = lambda current: [*pulls(current), torch.zeros(1)]
    assert [step(), step()] == [3, 3]


def test_a_kept_gradient_is_not_given_to_other_parameters_of_the_same_shapes():
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    seen = []

    def alignment(current):
        seen.append(current)
        return [torch.ones(3)]

    optimizer = SafeGradOptimizer(torch.optim.SGD([first, second], lr=0.1), alignment, refresh_every=10)
    for trained, frozen in ((first, second), (first, second), (second, first)):
        trained.requires_grad_(True)
        frozen.requires_grad_(False)
        frozen.grad, trained.grad = None, torch.ones(3)
        optimizer.step()
    assert [id(parameter) for (parameter,) in seen] == [id(first), id(second)]


def test_a_pushed_gradient_goes_before_pulling():
    pulls = Pulls()
    parameters, optimizer = make(pulls)
    set_grads(parameters, 0)
    optimizer.set_alignment_grad(random_grads(5))
    optimizer.step()
    assert pulls.calls == 0
    set_grads(parameters, 1)
    optimizer.step()
    assert pulls.calls == 1


def test_alignment_gets_the_trainable_parameters_in_order_with_gradients_enabled():
    seen = []

    def alignment(current):
        seen.append((current, torch.is_grad_enabled()))
        return [torch.ones_like(parameter) for parameter in current]

    parameters = make_parameters()
    parameters[1].requires_grad_(False)
    groups = [{"params": parameters[2:]}, {"params": parameters[:2]}]
    optimizer = SafeGradOptimizer(torch.optim.SGD(groups, lr=0.1), alignment)
    parameters[0].grad = torch.ones(SHAPES[0], dtype=torch.float64)
    optimizer.step()
    ((current, enabled),) = seen
    assert [id(parameter) for parameter in current] == [id(parameters[2]), id(parameters[0])]
    assert enabled


def test_pushing_a_mapping():
    parameters, optimizer = make(base=torch.optim.SGD)
    grads = random_grads(3)
    set_grads(parameters, 0)
    optimizer.set_alignment_grad(dict(reversed(list(zip(parameters, grads, strict=True)))))
    optimizer.step()
    expected, reference = make(base=torch.optim.SGD)
    set_grads(expected, 0)
    reference.set_alignment_grad(grads)
    reference.step()
    assert_same(parameters, expected)


# --- refusals -------------------------------------------------------------------------------------


def bad(position, value):
    grads = random_grads(3)
    grads[position].view(-1)[0] = value
    return grads


def replaced(position, tensor):
    grads = random_grads(3)
    grads[position] = tensor
    return grads


REFUSED = {
    "missing": (None, UnprotectedStepError, "No alignment gradient for step 2.*set_alignment_grad"),
    "wrong length": (random_grads(3)[:2], ValueError, "3 user-task gradients != 2 alignment gradients"),
    "wrong shape": (
        replaced(1, torch.zeros(4, dtype=torch.float64)),
        ValueError,
        r"Gradient 1: user-task shape \(3,\) != alignment shape \(4,\)",
    ),
    "wrong dtype": (replaced(1, torch.zeros(3)), ValueError, "Gradient 1: user-task dtype torch.float64"),
    "wrong device": (
        replaced(1, torch.zeros(3, dtype=torch.float64, device="meta")),
        ValueError,
        "Gradient 1: user-task device cpu != alignment device meta",
    ),
    "all None": ([None] * 3, ValueError, "All 3 alignment gradients are None"),
    "nan": (bad(0, math.nan), UnprotectedStepError, "alignment gradient is not finite"),
    "inf": (bad(2, -math.inf), UnprotectedStepError, "alignment gradient is not finite"),
    "unknown key": ({"a": None}, ValueError, r"miss 3 parameters.*1 unknown ones \(\['a'\]\)"),
}


@pytest.mark.parametrize("way", ["push", "pull"])
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing_and_training_goes_on(case, way):
    grads, error, message = REFUSED[case]
    if way == "pull" and (grads is None or isinstance(grads, dict)):
        pytest.skip("only pushed gradients can be missing or mapped")

    def run(fail):
        source = Pulls()
        served = []
        parameters, optimizer = make(
            (lambda current: served.pop() if served else source(current)) if way == "pull" else None
        )

        def step(seed):
            set_grads(parameters, seed)
            if way == "push":
                optimizer.set_alignment_grad(source(parameters))
            optimizer.step()

        step(0)
        if fail:
            set_grads(parameters, 1)
            before = snapshot(parameters, optimizer)
            if way == "pull":
                served.append(copy.deepcopy(grads))
            with pytest.raises(error, match=message):  # noqa: PT012
                if way == "push" and grads is not None:
                    optimizer.set_alignment_grad(copy.deepcopy(grads))
                optimizer.step()
            assert_same(snapshot(parameters, optimizer), before)
            assert optimizer.counts.steps == 1
        step(2)
        step(3)
        return snapshot(parameters, optimizer)

    assert_same(run(fail=True), run(fail=False))


def test_a_gradient_set_once_serves_once():
    parameters, optimizer = make()
    optimizer.set_alignment_grad(random_grads(1))
    set_grads(parameters, 0)
    optimizer.step()
    before = snapshot(parameters, optimizer)
    with pytest.raises(UnprotectedStepError, match="exactly one step"):
        optimizer.step()
    assert_same(snapshot(parameters, optimizer), before)


def test_a_refused_push_keeps_the_one_before():
    parameters, optimizer = make()
    optimizer.set_alignment_grad(random_grads(1))
    with pytest.raises(ValueError, match="!= 1 alignment"):
        optimizer.set_alignment_grad([None])
    set_grads(parameters, 0)
    optimizer.step()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_user_gradient_that_is_not_finite_is_refused(value):
    parameters, optimizer = make()
    set_grads(parameters, 0)
    parameters[1].grad[0] = value
    optimizer.set_alignment_grad(random_grads(1))
    before = snapshot(parameters, optimizer)
    with pytest.raises(UnprotectedStepError, match="user gradient is not finite"):
        optimizer.step()
    assert_same(snapshot(parameters, optimizer), before)


def test_a_pushed_gradient_is_that_of_the_time_it_was_set():
    expected, reference = make()
    set_grads(expected, 0)
    reference.set_alignment_grad(random_grads(1))
    reference.step()
    parameters, optimizer = make()
    # As a script does that computes both gradients in the same `.grad`.
    set_grads(parameters, 1)
    optimizer.set_alignment_grad([parameter.grad for parameter in parameters])
    for parameter, grad in zip(parameters, random_grads(0), strict=True):
        parameter.grad.copy_(grad)
    optimizer.step()
    assert_same(parameters, expected)


@pytest.mark.parametrize("leak", ["accumulates", "replaces"])
def test_an_alignment_that_leaks_into_the_user_gradient_is_refused(leak):
    def alignment(parameters):
        for parameter in parameters:
            if leak == "accumulates":
                parameter.grad += 1
            else:
                parameter.grad = torch.ones_like(parameter)
        return random_grads(1)

    parameters, optimizer = make(alignment)
    set_grads(parameters, 0)
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(UnprotectedStepError, match="changed the user gradient of parameter 0"):
        optimizer.step()
    assert_same([parameter.detach() for parameter in parameters], before)


def test_a_mapping_that_misses_or_adds_a_parameter_is_refused():
    parameters, optimizer = make()
    grads = dict(zip(parameters, random_grads(1), strict=True))
    del grads[parameters[1]]
    with pytest.raises(ValueError, match=r"miss 1 parameters \(of shapes \[\(3,\)\]\)"):
        optimizer.set_alignment_grad(grads)
    grads[parameters[1]], grads[torch.zeros(9)] = None, None
    with pytest.raises(ValueError, match=r"1 unknown ones \(\[torch.Size\(\[9\]\)\]\)"):
        optimizer.set_alignment_grad(grads)


def test_a_frozen_parameter_with_a_gradient_is_refused():
    parameters, optimizer = make(Pulls())
    set_grads(parameters, 0)
    parameters[0].requires_grad_(False)
    with pytest.raises(UnprotectedStepError, match=r"frozen parameter of shape \(4, 3\) in group 0"):
        optimizer.step()


def test_unprotected_steps_need_to_be_asked_for_and_are_counted():
    parameters, optimizer = make(allow_unprotected=True)
    expected = make_parameters()
    base = torch.optim.Adam(expected, lr=0.1)
    for step in range(2):
        set_grads(parameters, step)
        set_grads(expected, step)
        optimizer.step()
        base.step()
    assert_same(parameters, expected)
    assert optimizer.counts == (2, 0, 0, 2)
    assert optimizer.stats is None
    set_grads(parameters, 3)
    optimizer.set_alignment_grad(random_grads(1))
    optimizer.step()
    assert optimizer.counts.unprotected == 2


def test_a_step_without_user_gradients_is_refused_unless_it_may_be_unprotected():
    pulls = Pulls()
    parameters, optimizer = make(pulls)
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(UnprotectedStepError, match=r"None of the \d+ trainable parameters has a gradient"):
        optimizer.step()
    optimizer.allow_unprotected = True
    optimizer.step()
    assert_same([parameter.detach() for parameter in parameters], before)
    assert (pulls.calls, optimizer.counts.steps) == (0, 0)


def test_a_negligible_alignment_gradient_makes_a_plain_step_and_is_counted():
    parameters, optimizer = make(lambda current: [torch.zeros_like(parameter) for parameter in current])
    expected = make_parameters()
    base = torch.optim.Adam(expected, lr=0.1)
    set_grads(parameters, 0)
    set_grads(expected, 0)
    optimizer.step()
    base.step()
    assert_same(parameters, expected)
    assert optimizer.counts == (1, 0, 1, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho is -1.0"),
        ({"rho": math.nan}, ValueError, "rho is nan"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm is 0.0"),
        ({"refresh_every": 0}, ValueError, "refresh_every is 0"),
        ({"refresh_every": 1.5}, ValueError, "refresh_every is 1.5"),
        ({"alignment": [torch.zeros(1)]}, TypeError, "alignment is a list.*set_alignment_grad"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("name", "value"), [("rho", -1.0), ("max_grad_norm", 0.0), ("refresh_every", 0), ("alignment", [1])]
)
def test_an_option_set_later_is_checked_too(name, value):
    _, optimizer = make(Pulls())
    before = getattr(optimizer, name)
    with pytest.raises((ValueError, TypeError), match=f"{name} is"):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


def test_rho_set_during_a_run_is_saved_and_resumed():
    parameters, optimizer = make(Pulls(), rho=1.0)
    optimizer.rho = 2.5
    for keys in ({"safegrad"}, set()):  # torch.distributed.checkpoint drops keys of its own
        state = copy.deepcopy(optimizer.state_dict())
        state = {key: value for key, value in state.items() if key in keys | {"state", "param_groups"}}
        other, resumed = make(Pulls(), rho=1.0)
        with pytest.warns(UserWarning, match=r"rho 2.5, this optimizer 1.0.*after load_state_dict"):
            resumed.load_state_dict(state)
        assert resumed.rho == 2.5
        for group in (parameters, other):
            set_grads(group, 0)
    optimizer.step()
    resumed.step()
    assert_same(parameters, other)


def test_a_state_of_before_rho_was_saved_leaves_rho():
    _, optimizer = make(Pulls(), rho=1.0)
    state = optimizer.state_dict()
    del state["safegrad"]["rho"]
    _, resumed = make(Pulls(), rho=3.0)
    resumed.load_state_dict(state)
    assert resumed.rho == 3.0


def test_a_refused_state_leaves_the_gradient_that_still_serves_steps():
    pulls = Pulls()
    parameters, optimizer = make(pulls, refresh_every=100)
    set_grads(parameters, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["safegrad"]["pulled"].pop()
    with pytest.raises(ValueError, match="of 2 parameters, this optimizer has 3"):
        optimizer.load_state_dict(state)
    set_grads(parameters, 1)
    optimizer.step()
    assert pulls.calls == 1


def test_a_pushed_gradient_is_checked_against_the_parameters_of_the_step():
    """Freezing one between push and step must not shift the gradients by one."""
    parameters, optimizer = make()
    optimizer.set_alignment_grad(random_grads(1))
    parameters[0].requires_grad_(False)
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"user-task gradients != .* alignment gradients"):
        optimizer.step()


def test_a_pulled_gradient_that_is_not_finite_serves_no_further_step():
    """zero_grad() and go on with the next batch is what the error says."""
    pulled = iter([float("nan"), 1.0])

    def pull(parameters):
        value = next(pulled)
        return [torch.full_like(parameter, value) for parameter in parameters]

    parameters, optimizer = make(pull, refresh_every=10)
    set_grads(parameters, 3)
    with pytest.raises(UnprotectedStepError, match="not finite"):
        optimizer.step()
    set_grads(parameters, 3)
    optimizer.step()
    assert optimizer.counts.steps == 1


def test_a_null_step_in_mid_run_is_a_step():
    """Only before there is any state do zero gradients at a learning rate of 0 mean that state is made."""
    parameters, optimizer = make(lambda current: [torch.ones_like(parameter) for parameter in current])
    set_grads(parameters, 3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.counts.steps == 2
