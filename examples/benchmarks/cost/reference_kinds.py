"""What each kind of cached reference holds, and how far its KL and gradient are from the exact ones."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cost.training_steps import BATCH_SIZE, Work, with_adapters
from common.chat_data import collate, harmful_turns, response_loss
from safegrad_optim import KLAlignment, Reference

DRIFT_STEPS = 10
TOP_K = (8, 32, 128, 512)


class Kind(NamedTuple):
    """A kind of cache against the exact one, on a model that has left its reference."""

    name: str
    bytes_per_token: float
    kl: float
    kl_over_exact: float
    gradient_cosine: float


def compare_kinds(work: Work) -> list[Kind]:
    """Let the model drift by plain steps on harmful rows, and compare the kinds on one safety batch."""
    model = with_adapters(copy.deepcopy(work.model))
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    safety = work.safety[:1]
    kinds = {"logits": Reference(cache="logits"), "hidden": Reference(cache="hidden")} | {
        f"top_k = {k}": Reference(cache="top_k", top_k=k) for k in TOP_K
    }
    alignments = {name: KLAlignment(model, safety, reference=kind) for name, kind in kinds.items()}

    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    harmful = harmful_turns("attack")[: DRIFT_STEPS * BATCH_SIZE]
    for start in range(0, len(harmful), BATCH_SIZE):
        batch = collate(work.tokenizer, harmful[start : start + BATCH_SIZE])
        response_loss(model, {name: value.to(work.device) for name, value in batch.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = int((safety[0]["labels"] != -100).sum())
    found: list[Kind] = []
    exact: list[Tensor] = []
    for name, alignment in alignments.items():
        grads = [grad.double() for grad in alignment(parameters) if grad is not None]
        exact = exact or grads
        kl = float(alignment.last_loss)
        held = alignment.cache.nbytes / tokens
        found.append(Kind(name, held, kl, kl / found[0].kl if found else 1.0, _cosine(grads, exact)))
    return found


def _cosine(left: list[Tensor], right: list[Tensor]) -> float:
    first, second = (torch.cat([grad.flatten() for grad in grads]) for grads in (left, right))
    return float(torch.cosine_similarity(first, second, dim=0))
