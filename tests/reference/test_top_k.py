import pytest
import torch

from safegrad_optim import kl_divergence
from safegrad_optim.divergence import TopK, top_k_kl_divergence, top_k_log_probs

VOCABULARY = 40


def logits(tokens=7, scale=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, VOCABULARY, generator=generator)).to(dtype)


def naive(ref_logits, model_logits, k):
    """The same KL in float64, over explicit distributions of k + 1 outcomes."""
    total = torch.zeros((), dtype=torch.float64)
    for ref_row, row in zip(ref_logits.double().softmax(-1), model_logits.double().softmax(-1), strict=True):
        kept = ref_row.argsort(descending=True)[:k]
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[kept] = False
        p = torch.cat([ref_row[kept], ref_row[rest].sum()[None]])
        q = torch.cat([row[kept], row[rest].sum()[None]])
        total = total + (p * (p / q).log()).sum()
    return total


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
@pytest.mark.parametrize("chunk_size", [3, 256])
def test_value_and_gradient_match_the_oracle(k, chunk_size):
    ref, model = logits(seed=1), logits(seed=2).requires_grad_()
    exact = model.detach().double().requires_grad_()
    expected = naive(ref, exact, k)
    expected.backward()
    found = top_k_kl_divergence(top_k_log_probs(ref, k), model, chunk_size=chunk_size)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(model.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_the_error_is_what_happens_among_the_others(k):
    ref, model = logits(seed=1), logits(seed=2)
    whole = kl_divergence(ref.double(), model.double())
    missing = torch.zeros((), dtype=torch.float64)
    for ref_row, row in zip(ref.double().softmax(-1), model.double().softmax(-1), strict=True):
        rest = ref_row.argsort(descending=True)[k:]
        p, q = ref_row[rest] / ref_row[rest].sum(), row[rest] / row[rest].sum()
        missing += ref_row[rest].sum() * (p * (p / q).log()).sum()
    found = top_k_kl_divergence(top_k_log_probs(ref, k), model)
    assert missing > 0
    assert whole.item() - found.item() == pytest.approx(missing.item(), rel=1e-4)


def test_zero_at_the_reference():
    model = logits().requires_grad_()
    loss = top_k_kl_divergence(top_k_log_probs(model.detach(), 5), model)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert model.grad.abs().max() < 1e-6


def test_a_tail_below_the_rounding_of_one_counts():
    # 1 - P(K) would be 0 in fp32, and the mass that the model moves out of K free of charge.
    ref = torch.full((1, VOCABULARY), -25.0)
    ref[0, 0] = 0.0
    kept = top_k_log_probs(ref, 1)
    assert kept.log_probs[0, 1].item() == pytest.approx(-25.0 + torch.tensor(VOCABULARY - 1.0).log().item())


def test_a_reference_that_rules_the_others_out():
    ref = torch.full((1, VOCABULARY), -torch.inf)
    ref[0, :2] = 0.0
    model = logits(1).requires_grad_()
    loss = top_k_kl_divergence(top_k_log_probs(ref, 2), model)
    loss.backward()
    torch.testing.assert_close(loss, kl_divergence(ref, model.detach()))
    assert model.grad.isfinite().all()


def test_bf16_gradients_keep_their_dtype():
    model = logits(dtype=torch.bfloat16).requires_grad_()
    top_k_kl_divergence(top_k_log_probs(logits(seed=3), 4), model).backward()
    assert model.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("k", [0, VOCABULARY, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"top_k is {k}, expected 1 to {VOCABULARY - 1}"):
        top_k_log_probs(logits(), k)


def test_other_numbers_of_tokens():
    with pytest.raises(ValueError, match="7 tokens and the model's logits 6"):
        top_k_kl_divergence(top_k_log_probs(logits(), 3), logits(6))
    empty = TopK(torch.zeros(0, 4), torch.zeros(0, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="at least one"):
        top_k_kl_divergence(empty, logits(0))
