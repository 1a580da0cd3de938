"""What runs on several ranks."""

import torch
from torch.nn.parallel import DistributedDataParallel

from safegrad_optim import KLAlignment, SafeGradOptimizer
from tests.cases.support import sgd, user_backward
from tests.support.models import perturb, safety_rows, tiny_model

KEPT = 50


def largest_move_of_rows_kept_by_a_hook(parallel):
    """Take a step with a hook that trains the embeddings of the last tokens only."""
    model = tiny_model(tie_word_embeddings=False)
    embedding = model.model.embed_tokens.weight
    mask = torch.zeros(len(embedding), 1, dtype=embedding.dtype)
    mask[KEPT:] = 1
    embedding.register_hook(lambda grad: grad * mask)
    trained = DistributedDataParallel(model) if parallel else model
    alignment = KLAlignment(trained, safety_rows())
    perturb(model, 0.05)
    before = embedding.detach().clone()
    optimizer = SafeGradOptimizer(sgd(model), alignment)
    user_backward(trained)
    optimizer.step()
    moves = (embedding.detach() - before).abs()
    assert moves[KEPT:].any()
    return float(moves[:KEPT].max())
