"""The alignment pass asks nothing of the device, for each answer would be waited for."""

import pytest
import torch

from safegrad_optim import KLAlignment, LossAlignment, Reference, SafetySource
from tests.support.models import safety_rows, tiny_model, tiny_peft, trainable


def full(**options):
    model = tiny_model(attn_implementation="eager")
    return model, KLAlignment(model, sources(), **options)


def adapters(**options):
    model = tiny_peft(model=tiny_model(attn_implementation="eager", tie_word_embeddings=False))
    return model, KLAlignment(model, sources(), **options)


def plain_loss():
    model = tiny_model(attn_implementation="eager")
    return model, LossAlignment(model, safety_rows())


def sources():
    return [SafetySource(rows=safety_rows(6, seed), batch_size=2, weight=1.0 + seed) for seed in range(2)]


KINDS = {
    "hidden states and head": lambda: full(reference=Reference(cache="hidden")),
    "logits": lambda: full(reference=Reference(cache="logits")),
    "likeliest tokens": lambda: full(reference=Reference(cache="top_k", top_k=5)),
    "hidden states": adapters,
    "computed at each call": lambda: adapters(reference=Reference(cache=None)),
    "micro-batches": lambda: full(micro_batch_size=1),
    "a plain loss": plain_loss,
}


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="rotary embeddings ask for autocast on meta")
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_device_is_read(kind, monkeypatch):
    model, alignment = KINDS[kind]()
    # Only the first call, before anything has moved, compares weights and tokens.
    alignment(trainable(model))
    reading = getattr(alignment, "_reading", None)
    if reading is not None:
        # It would notice that the weights are others now.
        reading.watch = None
    # There is no autocast for tensors without values, of which reading one is an error.
    monkeypatch.setattr("safegrad_optim.forward._unchanged.device_type", lambda _: "cpu")
    model.to("meta")
    gradients = alignment(trainable(model))
    assert alignment.last_loss.device.type == "meta"
    assert all(gradient is None or gradient.device.type == "meta" for gradient in gradients)
    with pytest.raises(RuntimeError):
        float(alignment.last_loss)
