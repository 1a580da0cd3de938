"""What draws random numbers in training is off in the alignment pass, and on again behind it."""

import copy

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from safegrad_optim import KLAlignment
from tests.support.models import padded, perturb, safety_rows, tiny_model, tiny_peft, trainable
from tests.support.oracle import alignment_gradient


class Normalised(torch.nn.Module):
    """A layer whose output is normalised over the batch in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, torch.nn.BatchNorm1d(16)

    def forward(self, x):
        return self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)


class RateAsNumber(torch.nn.Module):
    """Dropout by a rate that the module, or its config, holds as a number."""

    def __init__(self, inner, in_config):
        super().__init__()
        self.inner = inner
        if in_config:
            self.config = copy.deepcopy(inner.config)
            self.config.resid_pdrop = 0.5
        else:
            self.resid_pdrop = 0.5

    def forward(self, x):
        rate = self.config.resid_pdrop if hasattr(self, "config") else self.resid_pdrop
        return torch.nn.functional.dropout(self.inner(x), rate, self.training)


class RateOfAnother(torch.nn.Module):
    """Dropout by the rate of a dropout that is not called."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(0.5)

    def forward(self, x):
        return torch.nn.functional.dropout(self.inner(x), self.dropout.p, self.training)


class JitteringRouter(torch.nn.Module):
    """Noise on what a router sees, in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.router_jitter_noise = inner, 0.5

    def forward(self, x):
        if self.training and self.router_jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.router_jitter_noise, 1 + self.router_jitter_noise)
        return self.inner(x)


class SkippedLayer(torch.nn.Module):
    """A layer that is left out now and then, in training."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.layerdrop = inner, 0.5

    def forward(self, x):
        skips = self.training and bool(torch.rand([]) < self.layerdrop)
        return torch.zeros_like(x) if skips else self.inner(x)


def each_mlp(wrap):
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = wrap(layer.mlp).double()
    return model


def noisy_embeddings():
    model = tiny_model()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 50.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return model


MODELS = {
    "attention_dropout": lambda: tiny_model(attention_dropout=0.5),
    "lora_dropout": lambda: tiny_peft(lora_dropout=0.5),
    "a rate of a module": lambda: each_mlp(lambda mlp: RateAsNumber(mlp, in_config=False)),
    "a rate of a config": lambda: each_mlp(lambda mlp: RateAsNumber(mlp, in_config=True)),
    "a rate of a dropout": lambda: each_mlp(RateOfAnother),
    "batch normalisation": lambda: each_mlp(Normalised),
    "jitter": lambda: each_mlp(JitteringRouter),
    "layerdrop": lambda: each_mlp(SkippedLayer),
    "noise on embeddings": noisy_embeddings,
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_that_without_randomness(kind):
    model, batch = MODELS[kind](), padded(safety_rows())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    aligned = copy.deepcopy(model)
    model.train()
    alignment = KLAlignment(model, batch)
    perturb(model, 0.1)
    twin = copy.deepcopy(model)
    found = alignment(trainable(model))
    loss, expected = alignment_gradient(aligned.eval(), twin.eval(), [batch])
    torch.testing.assert_close(alignment.last_loss, loss)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)
    # The user's passes are as random as before.
    with torch.no_grad():
        first, second = (model(**inputs, use_cache=False).logits for _ in range(2))
    assert (first != second).any() or kind == "batch normalisation"
