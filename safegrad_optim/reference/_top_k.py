"""KL to a reference of which only the k likeliest tokens and the mass of all others are kept."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TopK(NamedTuple):
    """A next-token distribution with everything outside its k likeliest tokens put together."""

    log_probs: Tensor
    """Log-probabilities of the k tokens and, last, of all others together: (tokens, k + 1), fp32."""
    indices: Tensor
    """The k tokens, (tokens, k), int32."""


@torch.no_grad()
def top_k_log_probs(logits: Tensor, k: int) -> TopK:
    """Keep of each distribution, (tokens, vocabulary), its k likeliest tokens and the mass of the others.

    Raises:
        ValueError: `k` is not at least 1 and less than the vocabulary.
    """
    if not 1 <= k < logits.shape[-1]:
        raise ValueError(f"top_k is {k}, expected 1 to {logits.shape[-1] - 1}, less than the vocabulary.")
    indices = logits.topk(k, dim=-1).indices
    return TopK(_known(logits, indices), indices.to(torch.int32))


def top_k_kl_divergence(ref: TopK, logits: Tensor, *, chunk_size: int = 16) -> Tensor:
    """Sum over tokens KL(P_ref || P_model) with all but k tokens taken as one, in nats, computed in fp32.

    sum_t [ sum_{v in K} P_ref(v) (log P_ref(v) - log P_model(v)) + P_ref(R) (log P_ref(R) - log P_model(R)) ]

    with K the k likeliest tokens of the reference and R the others. It is never above the KL of the whole
    distributions, and less by P_ref(R) KL(P_ref(. | R) || P_model(. | R)): what the model does among the
    tokens the reference hardly ever chooses.

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
    parts = []
    for chunk in zip(*(tensor.split(chunk_size) for tensor in (*ref, logits)), strict=True):
        parts.append(checkpoint(_divergence, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(parts).sum()


def _divergence(ref_log_probs: Tensor, indices: Tensor, logits: Tensor) -> Tensor:
    ref_probs = ref_log_probs.exp()
    terms = ref_probs * (ref_log_probs - _known(logits, indices))
    # Where the reference leaves nothing for the others, 0 * -inf is NaN and has to be 0.
    return terms.masked_fill(ref_probs == 0, 0.0).sum()


def _known(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities of the given tokens and of all others together: summed, as 1 - sum would round."""
    log_probs, indices = torch.log_softmax(logits, dim=-1, dtype=torch.float32), indices.long()
    rest = log_probs.scatter(1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_probs.gather(1, indices), rest], dim=-1)
