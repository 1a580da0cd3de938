import pytest
import torch

from safegrad_optim import LossAlignment, SafeGradOptimizer
from tests.support.models import padded, perturb, safety_rows, tiny_model, tiny_peft, trainable


@pytest.mark.parametrize("make", [tiny_model, tiny_peft])
def test_default_loss_is_the_cross_entropy_of_the_responses(make):
    model, rows = make(), safety_rows()
    perturb(model, 0.1)
    alignment = LossAlignment(model, rows)
    found = alignment(trainable(model))
    loss = model(**padded(rows)).loss
    expected = torch.autograd.grad(loss, trainable(model))
    assert alignment.last_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    # transformers computes its loss in fp32 whatever the dtype of the model.
    scale = max(gradient.abs().max().item() for gradient in expected)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6 * scale)


def test_own_loss_sees_the_model_without_dropout_and_each_batch():
    model, rows = tiny_peft(lora_dropout=0.5), safety_rows(4)
    seen = []

    def weight_decay(model, batch):
        first, second = (model(input_ids=batch["input_ids"]).logits for _ in range(2))
        seen.append((torch.equal(first, second), batch["labels"].shape[0]))
        return sum(parameter.square().sum() for parameter in trainable(model))

    alignment = LossAlignment(model, rows, weight_decay, batch_size=2)
    perturb(model)
    for _ in range(2):
        for gradient, parameter in zip(alignment(trainable(model)), trainable(model), strict=True):
            torch.testing.assert_close(gradient, 2 * parameter.detach())
    assert seen == [(True, 2), (True, 2)]
    assert model.training


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: 1.0, "a float"),
        (lambda model, batch: torch.tensor(1.0), "requires_grad False"),
        (lambda model, batch: next(iter(trainable(model))) * 1.0, r"shape \(2, 16\)"),
    ],
)
def test_a_loss_that_cannot_align_is_refused_with_the_step_not_taken(loss_fn, message):
    model = tiny_peft()
    optimizer = SafeGradOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), LossAlignment(model, safety_rows(), loss_fn)
    )
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.clone() for parameter in trainable(model)]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, trainable(model), strict=True))
    assert all((parameter.grad == 1).all() for parameter in trainable(model))
