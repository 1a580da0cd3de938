"""Whatever the architecture, the alignment pass leaves no trace, and its gradient is that of Eq. 6."""

import copy

import pytest
import torch
import transformers
from torch import nn

from safegrad_optim import KLAlignment
from tests.support.architectures import LEFT_OUT, architectures, small_model
from tests.support.models import padded, perturb, safety_rows, trainable
from tests.support.oracle import alignment_gradient

ARCHITECTURES = architectures()
_OF_MODULES = {*vars(nn.Module())}


def trace(model):
    """All that a pass could leave behind."""
    plain = {
        f"{name}.{key}": copy.copy(value) if type(value) in (list, dict, set) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in _OF_MODULES
    }
    return {
        "parameters": {name: value.clone() for name, value in model.named_parameters()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "plain": plain,
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def assert_same_trace(found, expected):
    for kind in ("parameters", "buffers"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert torch.equal(found[kind][name], value), name
    assert found["plain"].keys() == expected["plain"].keys()
    for name, value in expected["plain"].items():
        same = found["plain"][name] is value or (
            type(value) in (list, dict, set) and found["plain"][name] == value
        )
        assert same, name
    for name in ("modes", "hooks", "gradients"):
        assert found[name] == expected[name]
    assert torch.equal(found["random"], expected["random"])


def test_those_left_out_are_there():
    if transformers.__version__.startswith("5.24."):
        assert LEFT_OUT.keys() <= ARCHITECTURES.keys()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - LEFT_OUT.keys()))
def test_the_alignment_pass_is_exact_and_leaves_no_trace(name):
    try:
        model = small_model(ARCHITECTURES[name])
    except Exception as error:
        if transformers.__version__.startswith("5.24."):
            raise
        pytest.skip(f"not made small here: {error}")
    batch = padded(safety_rows(3))
    aligned = copy.deepcopy(model)
    torch.manual_seed(7)
    before = trace(model)
    alignment = KLAlignment(model, batch)
    zeros = alignment(trainable(model))
    assert_same_trace(trace(model), before)
    assert abs(float(alignment.last_loss)) < 1e-6
    assert max(float(grad.abs().max()) for grad in zeros if grad is not None) < 1e-5
    perturb(model, 0.05)
    before = trace(model)
    found = alignment(trainable(model))
    assert_same_trace(trace(model), before)
    loss, expected = alignment_gradient(aligned.eval(), copy.deepcopy(model).eval(), [batch])
    torch.testing.assert_close(alignment.last_loss.double(), loss, rtol=1e-4, atol=1e-6)
    scale = max(float(grad.abs().max()) for grad in expected if grad is not None)
    for left, right, parameter in zip(found, expected, trainable(model), strict=True):
        left, right = (torch.zeros_like(parameter) if grad is None else grad for grad in (left, right))
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Phimoe", r"other logits in eval mode than in training.*from model.layers.0.mlp.router"),
        ("ProphetNet", "have to correspond one to one"),
        ("Rwkv", r"wrote to 4 parameters \(first: rwkv.blocks.0.attention.output.weight\)"),
    ],
)
def test_models_whose_pass_cannot_be_exact_are_refused(name, message):
    if name not in ARCHITECTURES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = small_model(ARCHITECTURES[name])
    with pytest.raises((ValueError, RuntimeError), match=message):
        KLAlignment(model, padded(safety_rows(3)))
