"""KL(P_ref || P_model) between next-token distributions, whole or of the likeliest tokens."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def kl_divergence(ref_logits: Tensor, logits: Tensor, *, chunk_size: int = 16) -> Tensor:
    """Sum KL(P_ref || P_model) over tokens, in nats, computed in fp32 (fp64 for fp64 input).

    sum_t sum_v P_ref(v|t) (log P_ref(v|t) - log P_model(v|t))    (T times Eq. 6 of arXiv 2508.07172)

    The gradient by `logits` is P_model - P_ref, exactly zero where the rows are equal.

    Args:
        ref_logits: logits or log-probabilities of the reference, (tokens, vocabulary); no gradient.
        logits: logits of the model, same shape.
        chunk_size: number of tokens that forward and backward handle at a time.

    Raises:
        ValueError: shapes differ or are not 2-D, there is no token, or `chunk_size` is not positive.
    """
    if ref_logits.shape != logits.shape or logits.dim() != 2:
        raise ValueError(
            f"Reference logits {tuple(ref_logits.shape)} and model logits {tuple(logits.shape)} have to be "
            "of one shape (tokens, vocabulary). Compute both with one tokenizer on one batch."
        )
    if logits.shape[0] == 0:
        raise ValueError("Found no token to compare, expected at least one response token.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected a positive number of tokens.")
    return _KLDivergence.apply(ref_logits, logits, chunk_size)  # type: ignore[no-untyped-call, no-any-return]


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ref_logits: Tensor, logits: Tensor, chunk_size: int) -> Tensor:
        ctx.save_for_backward(ref_logits, logits)
        ctx.chunk_size = chunk_size
        chunks = zip(ref_logits.split(chunk_size), logits.split(chunk_size), strict=True)
        return reduce(torch.add, (_sum_of_kl(*map(_log_softmax, pair)) for pair in chunks))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        grad = torch.empty_like(ctx.saved_tensors[1])
        chunks = (tensor.split(ctx.chunk_size) for tensor in (*ctx.saved_tensors, grad))
        for ref_chunk, chunk, grad_chunk in zip(*chunks, strict=True):
            difference = _log_softmax(chunk).exp_().sub_(_log_softmax(ref_chunk).exp_())
            grad_chunk.copy_(difference.mul_(grad_output))
        return None, grad, None


class TopK(NamedTuple):
    """A next-token distribution with everything outside its k likeliest tokens put together."""

    log_probs: Tensor  # of the k tokens and, last, of all others together: (tokens, k + 1), fp32
    indices: Tensor  # the k tokens, (tokens, k), int32


@torch.no_grad()
def top_k_log_probs(logits: Tensor, k: int) -> TopK:
    """Keep of each distribution, (tokens, vocabulary), its k likeliest tokens and the mass of the others."""
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f"top_k is {k}, expected 1 to {logits.shape[-1] - 1}, less than the vocabulary.")
    indices = logits.topk(k, dim=-1).indices
    return TopK(_known(logits, indices), indices.to(torch.int32))


def top_k_kl_divergence(ref: TopK, logits: Tensor, *, chunk_size: int = 16) -> Tensor:
    """Sum over tokens KL(P_ref || P_model) with all but k tokens taken as one, in nats, computed in fp32.

    sum_t [ sum_{v in K} P_ref(v) (log P_ref(v) - log P_model(v)) + P_ref(R) (log P_ref(R) - log P_model(R)) ]

    with K the k likeliest tokens of the reference and R the others. It is the KL of the whole distributions
    less P_ref(R) KL(P_ref(. | R) || P_model(. | R)): what the model does among the tokens R.

    Args:
        ref: the reference, from `top_k_log_probs`; no gradient.
        logits: logits of the model, (tokens, vocabulary).
        chunk_size: number of tokens that forward and backward handle at a time.

    Raises:
        ValueError: numbers of tokens differ, or there is none.
    """
    if len(ref.log_probs) != len(logits) or len(logits) == 0:
        raise ValueError(
            f"The reference has {len(ref.log_probs)} tokens and the model's logits {len(logits)}; expected "
            "equally many, at least one. Compute both on one batch."
        )

    def divergence(ref_log_probs: Tensor, indices: Tensor, chunk: Tensor) -> Tensor:
        return _sum_of_kl(ref_log_probs, _known(chunk, indices))

    parts = []
    for chunk in zip(*(tensor.split(chunk_size) for tensor in (*ref, logits)), strict=True):
        parts.append(checkpoint(divergence, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(parts).sum()


def _known(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of the given tokens and of all others together: summed, as 1 - sum would round."""
    log_probs, indices = torch.log_softmax(logits, dim=-1, dtype=torch.float32), indices.long()
    rest = log_probs.scatter(1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(1, indices), rest], dim=-1)


def _sum_of_kl(ref_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    ref_probs = ref_log_probs.exp()
    terms = ref_probs * (ref_log_probs - log_probs)
    # What the reference rules out (log-probability -inf) adds nothing, though 0 * -inf is NaN.
    return terms.masked_fill(ref_probs == 0, 0.0).sum()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
