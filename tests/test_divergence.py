import pytest
import torch

from safegrad_optim import kl_divergence


def naive_kl(ref_logits, logits):
    ref, model = ref_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (ref.exp() * (ref - model)).sum()


def random_pair(tokens=7, vocabulary=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    pair = (3 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(tensor.to(dtype) for tensor in pair)


def test_hand_computed():
    ref_logits = torch.tensor([[0.75, 0.25]]).log()
    logits = torch.tensor([[0.5, 0.5]]).log()
    # 0.75 ln(0.75 / 0.5) + 0.25 ln(0.25 / 0.5) = 0.130812...
    assert kl_divergence(ref_logits, logits).item() == pytest.approx(0.13081203594113694, rel=1e-6)


def test_gradcheck():
    ref_logits, logits = random_pair()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kl_divergence(ref_logits, x, chunk_size=3), (logits,))


@pytest.mark.parametrize(
    # Input rounding is part of both sides; what differs is the fp32 arithmetic inside.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_any_chunk_size_matches_the_oracle(dtype, tolerance, chunk_size):
    ref_logits, logits = random_pair(dtype=dtype)
    logits.requires_grad_()
    value = kl_divergence(ref_logits, logits, chunk_size=chunk_size)
    value.backward()
    oracle_logits = logits.detach().double().requires_grad_()
    expected = naive_kl(ref_logits, oracle_logits)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    eps = max(torch.finfo(dtype).eps, 1e-6)  # the gradient is rounded once, to the dtype of the logits
    torch.testing.assert_close(logits.grad.double(), oracle_logits.grad, rtol=eps, atol=1e-6)


def test_log_probabilities_serve_as_logits():
    ref_logits, logits = random_pair()
    value = kl_divergence(ref_logits.log_softmax(-1), logits)
    assert value.item() == pytest.approx(naive_kl(ref_logits, logits).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_exactly_zero_at_the_reference(dtype):
    ref_logits, _ = random_pair(dtype=dtype)
    logits = ref_logits.clone().requires_grad_()
    kl_divergence(ref_logits, logits).backward()
    assert torch.count_nonzero(logits.grad) == 0


def test_tokens_ruled_out_by_both_add_nothing():
    ref_logits, logits = random_pair()
    expected = naive_kl(ref_logits[:, 1:], logits[:, 1:]).item()
    ref_logits[:, 0] = logits[:, 0] = -torch.inf
    logits.requires_grad_()
    value = kl_divergence(ref_logits, logits)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert logits.grad.isfinite().all()


def test_only_chunks_are_widened():
    class LargestFloat32(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.dim() == 2:
                self.rows = max(self.rows, result.shape[0])
            return result

    ref_logits, logits = random_pair(tokens=64, dtype=torch.bfloat16)
    logits.requires_grad_()
    with LargestFloat32() as largest:
        kl_divergence(ref_logits, logits, chunk_size=8).backward()
    assert largest.rows == 8


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 5), (3, 6)), r"\(3, 5\).*\(3, 6\).*one shape"),
        (((1, 3, 5), (1, 3, 5)), "one shape"),
        (((0, 5), (0, 5)), "no token"),
    ],
)
def test_refuses_unusable_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence(*(torch.zeros(shape) for shape in shapes))


def test_refuses_empty_chunks():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        kl_divergence(*random_pair(), chunk_size=0)
