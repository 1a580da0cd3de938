"""Scores of prompts averaged over the prompts most like them, so that one word more or less counts little."""

import torch
from torch import Tensor

# Prompts that others are compared with, at most; beyond it a random choice of them.
BANK = 100_000
_BLOCK_BYTES = 1 << 28


def neighbours_of_a_kind(scores: Tensor, threshold: float, most: int) -> int:
    """Return how many neighbours in a group above the threshold its members can have, at most `most`."""
    above = int((scores > threshold).sum())
    return min(most, above - 1) if above > 1 else most


@torch.no_grad()
def mean_over_neighbours(
    scores: Tensor, states: Tensor, count: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Return for each prompt the mean score of the `count` prompts nearest to it, itself left out.

    Near is by the cosine of the states, centred on their mean. Where there are more than `BANK` prompts,
    the neighbours are among so many random ones. With one prompt alone, its own score.

    Args:
        scores: (prompts,).
        states: (prompts, size), of any floating dtype.
        count: of neighbours.
        seed: of the random choice.
        device: where to compare; holds one block of similarities and the bank in half precision.
    """
    total = len(scores)
    if total == 1:
        return scores.clone()
    unit = torch.nn.functional.normalize(states.float() - states.float().mean(dim=0), dim=1)
    # Half precision takes half the memory on a GPU; few CPUs multiply in it fast.
    unit = unit.to(torch.float32 if torch.device(device).type == "cpu" else torch.float16)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:BANK] if total > BANK else torch.arange(total)
    bank, bank_scores = unit[chosen].to(device), scores[chosen].to(device)
    rows = max(1, _BLOCK_BYTES // (bank.element_size() * len(bank)))
    means = []
    for start in range(0, total, rows):
        block = unit[start : start + rows].to(device)
        similarity = block @ bank.T
        own = torch.arange(start, start + len(block))[:, None] == chosen
        similarity.masked_fill_(own.to(device), -torch.inf)
        nearest = similarity.topk(min(count, len(bank) - 1), dim=1).indices
        means.append(bank_scores[nearest].mean(dim=1).cpu())
    return torch.cat(means)
