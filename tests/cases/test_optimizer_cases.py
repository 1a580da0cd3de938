"""Situations around the optimizer's step, as they should go: who moves the parameters, and by what."""

import copy

import pytest
import torch

from safegrad_optim import KLAlignment, SafeGradOptimizer, UnprotectedStepError
from tests.cases.support import (
    PART_I,
    assert_same,
    flat,
    refused,
    right_or_refused,
    sgd,
    take_steps,
    user_backward,
)
from tests.support.models import padded, perturb, safety_rows, tiny_model, tiny_peft, trainable


def ones(parameters):
    return [torch.ones_like(parameter) for parameter in parameters]


def protected(model, base, **options):
    return SafeGradOptimizer(base, KLAlignment(model, safety_rows()), **options)


# --- who moves the parameters ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_model, tiny_peft])
def test_steps_inside_backward_are_refused(make):
    """Hooks that step each parameter in backward leave no gradient to protect, which is an error."""
    model = make()
    each = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in trainable(model)}

    def step_now(parameter):
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in each:
        parameter.register_post_accumulate_grad_hook(step_now)
    with refused():
        take_steps(model, protected(model, sgd(model)))


def test_an_optimizer_whose_parameters_are_all_frozen_is_refused():
    """An optimizer none of whose parameters is trained says so at the first step."""
    model = tiny_model()
    optimizer = protected(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    # Freezes what it was built over.
    with_adapters = tiny_peft(model=model)
    with refused():
        take_steps(with_adapters, optimizer)


def test_a_step_of_the_wrapped_optimizer_itself_is_refused():
    """The base knows that it is wrapped and does not step by itself."""
    model = tiny_peft()
    base = torch.optim.AdamW(trainable(model), lr=0.01)
    safe = protected(model, base)
    with refused():
        take_steps(model, base)
    assert safe.counts.steps == 0


def hidden_matrices(model):
    return [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]


def all_others(model):
    matrices = {id(parameter) for parameter in hidden_matrices(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in matrices]


def test_one_of_two_optimizers_wrapped_is_refused():
    """Trained parameters of the model that no wrapped group has are an error."""
    model = tiny_model()
    safe = protected(model, torch.optim.AdamW(all_others(model), lr=1e-3))
    bare = torch.optim.Muon(hidden_matrices(model), lr=0.01)
    user_backward(model)
    with refused():
        safe.step()
        bare.step()


def test_two_wrappers_on_one_alignment_are_refused():
    """Two optimizers would decide on the conflict for themselves and draw a safety batch each."""
    model = tiny_model()
    alignment = KLAlignment(model, safety_rows(), batch_size=2)
    with refused():
        muon = SafeGradOptimizer(torch.optim.Muon(hidden_matrices(model), lr=0.02), alignment)
        adam = SafeGradOptimizer(torch.optim.AdamW(all_others(model), lr=0.01), alignment)
        user_backward(model)
        muon.step()
        adam.step()


@pytest.mark.xfail(strict=True, reason=PART_I, raises=AssertionError)
def test_rows_whose_grad_is_masked_do_not_move():
    """Where the user has set `.grad` to zero between backward and step, nothing moves."""
    model = tiny_model(tie_word_embeddings=False)
    optimizer = protected(model, sgd(model))
    perturb(model, 0.05)
    embedding = model.model.embed_tokens.weight
    before = embedding.detach().clone()
    user_backward(model)
    embedding.grad[:50] = 0
    with right_or_refused():
        optimizer.step()
        assert_same(embedding.detach()[:50], before[:50])


def test_groups_at_learning_rate_zero_do_not_vote():
    """What moves moves as if all that does not move were frozen."""

    def run(frozen):
        model = tiny_model()
        alignment = KLAlignment(model, safety_rows())
        perturb(model, 0.1)
        moved = [p for name, p in model.named_parameters() if "layers.1" in name]
        kept = [p for name, p in model.named_parameters() if "layers.1" not in name]
        for parameter in kept:
            parameter.requires_grad_(not frozen)
        groups = [{"params": kept, "lr": 0.0}, {"params": moved, "lr": 0.1}]
        optimizer = SafeGradOptimizer(torch.optim.SGD(groups), alignment, rho=0.0)
        take_steps(model, optimizer, 8)
        return optimizer.counts.conflicts, moved

    conflicts, expected = run(frozen=True)
    assert conflicts > 0
    found_conflicts, found = run(frozen=False)
    torch.testing.assert_close(found, expected)
    assert found_conflicts == conflicts


# --- optimizers that do things of their own -------------------------------------------------------


class OffloadOptimizer(torch.optim.Optimizer):
    """As those that keep their state elsewhere: without Optimizer.__init__."""

    def __init__(self, parameters):
        self._groups = [{"params": list(parameters), "lr": 0.1}]
        self.state = {}

    @property
    def param_groups(self):
        return self._groups

    def step(self, closure=None):
        pass


def test_an_optimizer_without_defaults_is_wrapped_or_refused():
    """An optimizer that is none of torch's in full works, or the error says what it lacks."""
    model = tiny_model()
    with right_or_refused():
        user_backward(model)
        optimizer = protected(model, OffloadOptimizer(model.parameters()))
        optimizer.step()
        assert optimizer.counts.steps == 1


def test_hooks_that_take_gradients_elsewhere_get_the_users_only():
    """A hook that copies each gradient as it arrives is not given the alignment's."""
    model = tiny_model()
    arrived = []
    weight = model.lm_head.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: arrived.append(parameter.grad.clone()))
    with right_or_refused():
        optimizer = protected(model, sgd(model))
        perturb(model, 0.05)
        user_backward(model)
        users = weight.grad.clone()
        optimizer.step()
        assert_same(arrived, [users])


class Recorded:
    """An alignment whose gradients are kept."""

    def __init__(self, alignment):
        self.alignment = alignment
        self.last = None

    def __call__(self, parameters):
        self.last = self.alignment(parameters)
        return self.last


def schedule_free_around(base):
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.ScheduleFreeWrapper(base, momentum=0.9)


def test_a_wrapper_outside_that_moves_weights_before_the_step():
    """The alignment gradient is of the weights that the user's gradient is of, or the order is refused."""
    model = tiny_model()
    alignment = KLAlignment(model, safety_rows())  # one batch
    perturb(model, 0.1)
    recorded = Recorded(alignment)
    with right_or_refused():
        optimizer = schedule_free_around(SafeGradOptimizer(sgd(model), recorded))
        optimizer.train()
        for step in range(4):
            user_backward(model, step)
            expected = flat(alignment(trainable(model)))
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(flat(recorded.last), expected)


@pytest.mark.parametrize("written", ["average", "decay", "restored"])
def test_weights_that_are_written_to_between_backward_and_step_are_refused(written):
    model = tiny_model()
    optimizer = protected(model, sgd(model))
    perturb(model, 0.1)
    weight = model.lm_head.weight

    def write():
        with torch.no_grad():
            if written == "decay":
                weight.mul_(0.9)
            elif written == "average":
                weight.lerp_(torch.zeros_like(weight), 0.5)
            else:
                model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})

    take_steps(model, optimizer)
    write()
    take_steps(model, optimizer)
    user_backward(model)
    write()
    before = flat(trainable(model))
    with refused("written to between backward"):
        optimizer.step()
    assert_same(flat(trainable(model)), before)
    optimizer.zero_grad()
    write()
    take_steps(model, optimizer)


@pytest.mark.parametrize("copied", [False, True])
def test_a_base_that_is_no_subclass_of_optimizer(copied):
    """The order of schedule-free averaging that is right, inside, is taken, and the base guarded."""
    model = tiny_model()
    optimizer = protected(model, schedule_free_around(sgd(model)))
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.train()
    take_steps(model, optimizer)
    assert optimizer.counts.steps == 3
    user_backward(model)
    with pytest.raises(UnprotectedStepError, match="ScheduleFreeWrapper was stepped by itself"):
        optimizer.base_optimizer.step()
    unwrapped = optimizer.unwrap()
    unwrapped.step()
    assert optimizer.counts.steps == 3


def test_a_schedule_that_asks_the_base_for_its_learning_rate():
    """Adafactor's own schedule reads the learning rate through the wrapper as from the bare optimizer."""
    optimization = pytest.importorskip("transformers.optimization")

    def rates(wrapped):
        model = tiny_model()
        options = {"scale_parameter": True, "relative_step": True, "warmup_init": True, "lr": None}
        optimizer = optimization.Adafactor(model.parameters(), **options)
        optimizer = protected(model, optimizer) if wrapped else optimizer
        schedule = optimization.AdafactorSchedule(optimizer)
        user_backward(model)
        optimizer.step()
        schedule.step()
        return schedule.get_last_lr()

    assert rates(wrapped=True) == rates(wrapped=False)


def test_gradients_in_another_dtype_than_their_parameters():
    """The fp32 gradients that torch keeps of bf16 parameters are protected."""
    model = tiny_model(dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    optimizer = protected(model, sgd(model))
    perturb(model, 0.1)
    user_backward(model)
    optimizer.step()
    assert optimizer.counts.steps == 1


# --- steps that count as protected ----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of Dynamo, about torch's code and ours
@pytest.mark.parametrize("given", ["an alignment", "none"])
def test_a_compiled_step_is_counted(given):
    """Under torch.compile steps have the counts and statistics that they have without."""

    def run(compiled):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        against = None if given == "none" else lambda ps: [-grad for grad in ones(ps)]
        optimizer = SafeGradOptimizer(sgd(model), against, allow_unprotected=given == "none")
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            step()
            optimizer.zero_grad()
        return optimizer.counts, optimizer.stats and optimizer.stats.to_dict()

    assert run(compiled=True) == run(compiled=False)


def loss_that_is_never_unscaled():
    model = tiny_peft(torch.float32)
    return model, protected(model, torch.optim.AdamW(trainable(model), lr=0.01)), 2.0**24


def safety_rows_that_are_all_padding():
    model = tiny_peft(torch.float32)
    rows = [row | {"attention_mask": [0] * len(row["input_ids"])} for row in safety_rows()]
    return model, SafeGradOptimizer(torch.optim.AdamW(trainable(model), lr=0.01), KLAlignment(model, rows)), 1


def alignment_that_gives_zeros():
    model = tiny_peft(torch.float32)
    zeros = lambda parameters: [torch.zeros_like(parameter) for parameter in parameters]  # noqa: E731
    return model, SafeGradOptimizer(torch.optim.AdamW(trainable(model), lr=0.01), zeros), 1


@pytest.mark.parametrize(
    "build", [loss_that_is_never_unscaled, safety_rows_that_are_all_padding, alignment_that_gives_zeros]
)
def test_a_run_whose_steps_are_all_negligible_is_told(build):
    """A run in which no alignment gradient ever counts is not taken for a protected one."""
    with refused():
        model, optimizer, scale = build()
        take_steps(model, optimizer, 20, scale=scale)


def test_a_final_gradient_that_overflows_is_refused():
    """Two finite gradients whose sum is not finite in fp16 leave the parameters as they are."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.half))
    parameter.grad = torch.full_like(parameter, 6e4)
    optimizer = SafeGradOptimizer(torch.optim.SGD([parameter], lr=1e-6), lambda _: [parameter.grad.clone()])
    with refused():
        optimizer.step()
    assert not parameter.any()


def test_a_step_that_fails_in_the_base_can_be_taken_again():
    """After an error of the base the same step gives what it would have given at first."""

    def run(fails):
        model = tiny_peft()
        base = sgd(model)
        optimizer = protected(model, base)
        take_steps(model, optimizer, 2)
        user_backward(model, seed=60)
        if fails:

            def out_of_memory(*_):
                raise torch.OutOfMemoryError

            handle = base.register_step_pre_hook(out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            handle.remove()
        optimizer.step()
        return optimizer.counts, trainable(model)

    counts, expected = run(fails=False)
    found_counts, found = run(fails=True)
    assert found_counts == counts
    torch.testing.assert_close(found, expected)


# --- the state of another run ---------------------------------------------------------------------


def another_order():
    return KLAlignment(tiny_peft(), reshuffled(seed=1), batch_size=2)


def reshuffled(seed):
    """As a DataLoader with shuffle=True gives them at each start."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = safety_rows(6)
    return [padded([rows[index] for index in order[start : start + 2]]) for start in (0, 2, 4)]


def other_rows():
    return KLAlignment(tiny_peft(), safety_rows(6, seed=42), batch_size=2)


def other_positions():
    return KLAlignment(tiny_peft(), reshuffled(seed=0), positions="all")


def no_alignment_of_its_own():
    inner = KLAlignment(tiny_peft(), reshuffled(seed=0))
    return lambda parameters: inner(parameters)


@pytest.mark.parametrize("build", [another_order, other_rows, other_positions, no_alignment_of_its_own])
def test_the_state_of_a_run_with_another_alignment_is_refused(build):
    """A run resumes on the safety batches, positions and alignment that it was saved with."""
    saved = KLAlignment(tiny_peft(), reshuffled(seed=0))
    state = SafeGradOptimizer(sgd(saved.model), saved).state_dict()
    resumed = SafeGradOptimizer(sgd(tiny_peft()), build())
    with refused():
        resumed.load_state_dict(state)
