"""KL(P_ref || P_model) between next-token distributions, without holding it all in fp32 at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kl_divergence(ref_logits: Tensor, logits: Tensor, *, chunk_size: int = 16) -> Tensor:
    """Sum KL(P_ref || P_model) over tokens, in nats, computed in fp32 (fp64 for fp64 input).

    sum_t sum_v P_ref(v|t) (log P_ref(v|t) - log P_model(v|t))

    Divide by the number of tokens for the mean of Eq. 6. The gradient by `logits` is P_model - P_ref, exactly
    zero where the rows are equal. Beyond it, forward and backward hold `chunk_size` rows at a time.

    Args:
        ref_logits: logits or log-probabilities of the reference, (tokens, vocabulary); no gradient.
        logits: logits of the model, same shape.
        chunk_size: number of tokens handled at a time.

    Raises:
        ValueError: shapes differ or are not 2-D, there is no token, or `chunk_size` is not positive.

    Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Eq. 6.
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
    result: Tensor = _KLDivergence.apply(ref_logits, logits, chunk_size)  # type: ignore[no-untyped-call]
    return result


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ref_logits: Tensor, logits: Tensor, chunk_size: int) -> Tensor:
        ctx.save_for_backward(ref_logits, logits)
        ctx.chunk_size = chunk_size
        total = logits.new_zeros((), dtype=_wide(logits))
        for ref_chunk, chunk in zip(ref_logits.split(chunk_size), logits.split(chunk_size), strict=True):
            ref_log_probs = _log_softmax(ref_chunk)
            ref_probs = ref_log_probs.exp()
            terms = ref_probs * (ref_log_probs - _log_softmax(chunk))
            # A token the reference rules out (logit -inf) adds nothing, though 0 * -inf is NaN.
            total += terms.masked_fill_(ref_probs == 0, 0.0).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        grad = torch.empty_like(ctx.saved_tensors[1])
        chunks = (tensor.split(ctx.chunk_size) for tensor in (*ctx.saved_tensors, grad))
        for ref_chunk, chunk, grad_chunk in zip(*chunks, strict=True):
            difference = _log_softmax(chunk).exp_().sub_(_log_softmax(ref_chunk).exp_())
            grad_chunk.copy_(difference.mul_(grad_output))
        return None, grad, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=_wide(logits))
