"""Optimizers and trainers of other libraries around and inside the wrapper, as their users write them."""

import inspect

import peft
import pytest
import torch

from safegrad_optim import KLAlignment, SafeGradOptimizer
from tests.support.models import VOCABULARY, safety_rows, tiny_model, tiny_peft, trainable

SHAPES = [(6, 4), (8, 6)]  # matrices, for the sake of Muon and its kin


def make_parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def agreeing(parameters):
    """An alignment gradient without conflict, which rho = 0 therefore leaves out."""
    return [0.5 * parameter.grad for parameter in parameters]


def wrap(base):
    return SafeGradOptimizer(base, agreeing, rho=0.0)


def train(parameters, optimizer, steps=7):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch.manual_seed(step)  # some optimizers draw random numbers
        optimizer.step()


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def assert_bit_identical(build):
    """Compare wrapped and bare, and return whether they have moved at all."""
    # One after the other: making the parameters seeds what an optimizer draws.
    wrapped_parameters = make_parameters()
    wrapped = wrap(build(wrapped_parameters))
    train(wrapped_parameters, wrapped)
    bare_parameters = make_parameters()
    train(bare_parameters, build(bare_parameters))
    assert wrapped.counts == (7, 0, 0, 0)
    assert_same(wrapped_parameters, bare_parameters)
    return any((new != old).any() for new, old in zip(bare_parameters, make_parameters(), strict=True))


# --- schedulefree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize("foreach", [True, False])
def test_schedulefree(name, foreach):
    schedulefree = pytest.importorskip("schedulefree")

    def run(wrapped):
        parameters = make_parameters()
        optimizer = getattr(schedulefree, name)(parameters, lr=0.1, foreach=foreach)
        if wrapped:
            optimizer = wrap(optimizer)
        seen = []
        for _ in range(2):
            optimizer.train()
            train(parameters, optimizer, 3)
            optimizer.eval()
            seen.append([parameter.detach().clone() for parameter in parameters])
        return seen

    expected = run(wrapped=False)
    assert_same(run(wrapped=True), expected)
    assert any((new != old).any() for new, old in zip(*expected, strict=True))


def test_schedulefree_refuses_a_step_on_evaluation_weights():
    schedulefree = pytest.importorskip("schedulefree")
    parameters = make_parameters()
    optimizer = wrap(schedulefree.AdamWScheduleFree(parameters, lr=0.1))
    optimizer.train()
    train(parameters, optimizer, 2)
    optimizer.eval()
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(Exception, match="not in train mode"):
        train(parameters, optimizer, 1)
    assert_same([parameter.detach() for parameter in parameters], before)
    optimizer.train()
    train(parameters, optimizer, 1)


def test_schedulefree_takes_its_alignment_gradient_on_training_weights():
    schedulefree = pytest.importorskip("schedulefree")
    model = tiny_peft()
    alignment = KLAlignment(model, safety_rows())
    optimizer = SafeGradOptimizer(schedulefree.AdamWScheduleFree(trainable(model), lr=0.05), alignment)
    optimizer.train()
    for step in range(3):
        user_step(model, optimizer, step)
    training = [parameter.detach().clone() for parameter in trainable(model)]
    seen = []
    optimizer.alignment = lambda parameters: (
        seen.extend(p.detach().clone() for p in parameters) or agreeing(parameters)
    )
    user_step(model, optimizer, 3)
    assert_same(seen, training)


@pytest.mark.parametrize("name", ["AdamWScheduleFreeClosure", "SGDScheduleFreeClosure"])
def test_schedulefree_closure_variants_are_refused(name):
    schedulefree = pytest.importorskip("schedulefree")
    with pytest.raises(TypeError, match=f"{name} evaluates its closure"):
        wrap(getattr(schedulefree, name)(make_parameters()))


# --- pytorch_optimizer ----------------------------------------------------------------------------

ELSEWHERE = "not built from a list of parameters"
MATRICES = "groups say use_muon"
# Each class that does not step when built with its defaults, and why.
NOT_PLAIN = {
    "AdaGO": MATRICES,
    "AdaHessian": "needs backward(create_graph=True)",
    "AdaLOMO": ELSEWHERE,
    "AdaMuon": MATRICES,
    "AdamMini": ELSEWHERE,
    "AliG": "needs the loss from a closure",
    "BSAM": "needs a closure",
    "DeMo": "needs a process group",
    "DistributedMuon": "needs a process group",
    "FriendlySAM": "needs a closure",
    "GSAM": "needs a closure",
    "Kron": "draws at random, and not always alike in a test of this size",
    "LBFGS": "needs a closure",
    "LOMO": ELSEWHERE,
    "LookSAM": "needs a closure",
    "Lookahead": "wraps an optimizer",
    "Muon": MATRICES,
    "MuonClip": MATRICES,
    "NorMuon": MATRICES,
    "OrthoGrad": "wraps an optimizer",
    "PCGrad": ELSEWHERE,
    "Ranger21": "needs the number of steps",
    "SAM": "needs a closure",
    "SafeFP16Optimizer": "wraps an optimizer",
    "ScheduleFreeWrapper": "wraps an optimizer",
    "SophiaH": "needs backward(create_graph=True)",
    "TRAC": "wraps an optimizer",
    "WSAM": "needs a closure",
}


@pytest.fixture
def zoo():
    return pytest.importorskip("pytorch_optimizer")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_plain_optimizer_of_pytorch_optimizer(zoo):
    kinds = {
        name: kind
        for name, kind in vars(zoo).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    }
    assert {"Lion", "AdEMAMix", "Prodigy", "SOAP", "Shampoo", "Adan", "ADOPT"} <= kinds.keys()
    tested = kinds.keys() - NOT_PLAIN.keys()
    assert len(tested) > 100
    still = set()
    for name in sorted(tested):
        try:
            if not assert_bit_identical(kinds[name]):
                still.add(name)
        except Exception as error:
            error.add_note(f"in pytorch_optimizer.{name}")
            raise
    # The one waits for ten gradients, the other moves only weights that are nearly zero.
    assert still == {"AdaShift", "SaRA"}


@pytest.mark.parametrize("name", ["Lion", "AdEMAMix", "SOAP"])
def test_maximizing_is_refused_here_too(zoo, name):
    with pytest.raises(ValueError, match=f"{name} has maximize=True"):
        wrap(getattr(zoo, name)(make_parameters(), maximize=True))


@pytest.mark.parametrize("name", [name for name, reason in NOT_PLAIN.items() if reason == MATRICES])
def test_muon_and_its_kin(zoo, name):
    def build(parameters):
        groups = [
            {"params": parameters[:1], "use_muon": True},
            {"params": parameters[1:], "use_muon": False},
        ]
        return getattr(zoo, name)(groups)

    assert assert_bit_identical(build)


@pytest.mark.parametrize("name", ["Lookahead", "OrthoGrad", "TRAC", "ScheduleFreeWrapper"])
def test_wrappers_of_other_optimizers(zoo, name):
    def build(parameters):
        outer = getattr(zoo, name)(torch.optim.AdamW(parameters, lr=0.1))
        if hasattr(outer, "train"):
            outer.train()
        return outer

    assert_bit_identical(build)


@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
# torch warns of the reference cycle that create_graph=True makes.
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
def test_second_order_optimizers_use_the_hessian_of_the_users_loss(zoo, name):
    def run(wrapped):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        inputs = torch.randn(8, 4)
        optimizer = getattr(zoo, name)(model.parameters())
        if wrapped:
            optimizer = SafeGradOptimizer(
                optimizer, lambda current: [0.5 * p.grad.detach() for p in current], rho=0.0
            )
        for step in range(3):
            torch.manual_seed(step)
            model(inputs).square().mean().backward(create_graph=True)
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    assert_same(run(wrapped=True), run(wrapped=False))


def sharpness_aware(zoo, name, parameters):
    model = torch.nn.ParameterList(parameters)
    return {
        "SAM": lambda: zoo.SAM(parameters, torch.optim.SGD, lr=0.1),
        "FriendlySAM": lambda: zoo.FriendlySAM(parameters, torch.optim.SGD, lr=0.1),
        "LookSAM": lambda: zoo.LookSAM(parameters, torch.optim.SGD, lr=0.1),
        "WSAM": lambda: zoo.WSAM(model, parameters, torch.optim.SGD, lr=0.1),
        "BSAM": lambda: zoo.BSAM(parameters, num_data=8),
        "AliG": lambda: zoo.AliG(parameters),
    }[name]()


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("name", ["SAM", "FriendlySAM", "LookSAM", "WSAM", "BSAM", "AliG"])
def test_optimizers_that_need_a_closure_inside_the_step_move_nothing(zoo, name, closure):
    # Their step() has a closure that may be left out, so they are found out at the first step.
    parameters = make_parameters()
    optimizer = wrap(sharpness_aware(zoo, name, parameters))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(zoo.base.exception.NoClosureError, match=r"requires closure"):
        optimizer.step((lambda: torch.zeros(())) if closure else None)
    assert_same(parameters, make_parameters())
    assert not hasattr(optimizer, "first_step")  # the two steps of a SAM loop without a closure


# --- bitsandbytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW"])
def test_bitsandbytes_on_a_cpu(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def run(wrapped):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(128, 64))  # 8-bit states need 4096 elements
        optimizer = getattr(bitsandbytes.optim, name)([parameter], lr=0.01)
        base = optimizer
        if wrapped:
            optimizer = wrap(optimizer)
        train([parameter], optimizer, 4)
        # Its own state_dict has quantised states, which a resumed run needs.
        optimizer.load_state_dict(optimizer.state_dict())
        train([parameter], optimizer, 4)
        assert base.state[parameter]["state1"].dtype == (
            torch.uint8 if name.endswith("8bit") else torch.float32
        )
        return parameter

    assert_same(run(wrapped=True), run(wrapped=False))


# --- PEFT -----------------------------------------------------------------------------------------


def user_step(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=generator)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def base_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"lora_bias": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning")  # says that it cannot be merged
def test_peft_variants_take_protected_steps(variant):
    model = tiny_peft(model=tiny_model(tie_word_embeddings=False), **variant)
    optimizer = SafeGradOptimizer(
        torch.optim.AdamW(trainable(model), lr=0.02), KLAlignment(model, safety_rows())
    )
    before = base_of(model)
    for step in range(4):
        user_step(model, optimizer, step)
    assert optimizer.counts.steps == 4
    assert optimizer.counts.negligible == 1
    assert float(optimizer.stats.alignment_norm) > 0
    if "modules_to_save" not in variant:
        after = {name: base_of(model)[name] for name in before if "magnitude" not in name}
        assert_same(after, {name: before[name] for name in after})


def test_only_the_active_of_several_adapters_is_trained():
    model = tiny_peft()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    model.to(torch.float64)
    alignment = KLAlignment(model, safety_rows())
    optimizer = SafeGradOptimizer(torch.optim.AdamW(trainable(model), lr=0.05), alignment)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    for step in range(3):
        user_step(model, optimizer, step)
    for name, parameter in model.named_parameters():
        if name in first:
            assert_same(parameter.detach(), first[name])
    assert optimizer.counts == (3, optimizer.counts.conflicts, 1, 0)


def test_a_trained_bias_outside_the_adapters_is_refused():
    model = tiny_model("Qwen2", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"trainable parameters are outside the adapters.*bias='none'"):
        KLAlignment(tiny_peft(model=model, bias="all"), safety_rows())
