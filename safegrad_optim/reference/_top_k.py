"""KL to a reference of which only the k likeliest tokens and the mass of all others are kept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class TopK(NamedTuple):
    """A next-token distribution with everything outside its k likeliest tokens put together."""

    log_probs: Tensor
    """Log-probabilities of the k tokens and, last, of all others together: (tokens, k + 1), fp32."""
    indices: Tensor
    """The k tokens, (tokens, k), int32."""


@torch.no_grad()
def top_k_log_probs(logits: Tensor, k: int) -> TopK:
    """Keep of each distribution its k likeliest tokens and the mass of the others.

    Args:
        logits: logits or log-probabilities, (tokens, vocabulary).
        k: number of tokens to keep, at least 1 and less than the vocabulary.

    Raises:
        ValueError: `k` is out of range.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f"top_k is {k}, expected 1 to {logits.shape[-1] - 1}, less than the vocabulary.")
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    values, indices = log_probs.topk(k, dim=-1)
    return TopK(torch.cat([values, _rest(log_probs, indices)], dim=-1), indices.to(torch.int32))


def top_k_kl_divergence(ref: TopK, logits: Tensor, *, chunk_size: int = 16) -> Tensor:
    """Sum over tokens KL(P_ref || P_model) with all but k tokens taken as one, computed in fp32.

    sum_t [ sum_{v in K} P_ref(v) (log P_ref(v) - log P_model(v)) + P_ref(R) (log P_ref(R) - log P_model(R)) ]

    with K the k likeliest tokens of the reference and R the others. It is never above the KL of the whole
    distributions, and less by P_ref(R) KL(P_ref(. | R) || P_model(. | R)): what the model does among the
    tokens the reference hardly ever chooses. Forward and backward hold `chunk_size` rows at a time.

    Args:
        ref: the reference, from `top_k_log_probs`; no gradient.
        logits: logits of the model, (tokens, vocabulary).
        chunk_size: number of tokens handled at a time.

    Returns:
        A 0-dim tensor, in nats.

    Raises:
        ValueError: numbers of tokens differ, or there is none.
    """
    if len(ref.log_probs) != len(logits) or len(logits) == 0:
        raise ValueError(
            f"The reference has {len(ref.log_probs)} tokens and the model's logits {len(logits)}; expected "
            "equally many, at least one. Compute both on one batch."
        )
    result: Tensor = _TopKDivergence.apply(*ref, logits, chunk_size)  # type: ignore[no-untyped-call]
    return result


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ref_log_probs: Tensor, indices: Tensor, logits: Tensor, chunk_size: int) -> Tensor:
        ctx.save_for_backward(ref_log_probs, indices, logits)
        ctx.chunk_size = chunk_size
        total = torch.zeros((), device=logits.device)
        for ref_chunk, index_chunk, chunk in _chunks(chunk_size, ref_log_probs, indices, logits):
            log_probs = torch.log_softmax(chunk, dim=-1, dtype=torch.float32)
            known = torch.cat([log_probs.gather(1, index_chunk), _rest(log_probs, index_chunk)], dim=-1)
            ref_probs = ref_chunk.exp()
            # Where the reference leaves nothing for the others, 0 * -inf is NaN and has to be 0.
            total += (ref_probs * (ref_chunk - known)).masked_fill_(ref_probs == 0, 0.0).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, None, Tensor, None]:
        ref_log_probs, indices, logits = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for ref_chunk, index_chunk, chunk, grad_chunk in _chunks(
            ctx.chunk_size, ref_log_probs, indices, logits, grad
        ):
            log_probs = torch.log_softmax(chunk, dim=-1, dtype=torch.float32)
            # Among the others the reference is taken to spread its mass as the model does.
            rest = _rest(log_probs, index_chunk)
            scale = torch.where(ref_chunk[:, -1:].isneginf(), 0.0, (ref_chunk[:, -1:] - rest).exp())
            probs = log_probs.exp_()
            known = probs.gather(1, index_chunk) - ref_chunk[:, :-1].exp()
            difference = probs.mul_(1 - scale).scatter_(1, index_chunk, known)
            grad_chunk.copy_(difference.mul_(grad_output))
        return None, None, grad, None


def _chunks(size: int, ref_log_probs: Tensor, indices: Tensor, *others: Tensor) -> Any:
    return zip(
        *(tensor.split(size) for tensor in (ref_log_probs, indices.long(), *others)),
        strict=True,
    )


def _rest(log_probs: Tensor, indices: Tensor) -> Tensor:
    """Log of the mass outside the given tokens, (tokens, 1): summed, since 1 - sum would round it away."""
    return log_probs.scatter(1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
