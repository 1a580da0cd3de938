"""How the quickstart judges a model, and what it observes of steps."""

import argparse
import math
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from common.quickstart_data import Data, batches
from common.report import Arm, Evaluation
from common.scoring import generate, refusal_rate, task_accuracy
from safegrad_optim import KLAlignment, SafeGradOptimizer, inner_products, is_refusal, kl_divergence

__all__ = ["evaluate", "observe"]

# A refusal shows in its first words.
REPLY_TOKENS = 12
# Steps that SafeGrad does not touch are observed now and then, for that takes as long as a step of it.
OBSERVE_EVERY = 20


def observe(arm: Arm, step: int, optimizer: Any, alignment: KLAlignment) -> None:
    """Note cosine of user and alignment gradient, and KL, before the step of this number."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, SafeGradOptimizer):
        # Those of the step before, as the optimizer knows them.
        if optimizer.stats is not None:
            arm.observe(step - 1, float(optimizer.stats.cosine), float(alignment.last_loss))
        arm.conflict_rate = optimizer.counts.conflicts / max(1, optimizer.counts.steps)
    elif step % OBSERVE_EVERY == 0 and parameters[0].grad is not None:
        products = inner_products([parameter.grad for parameter in parameters], alignment(parameters))
        norms = math.sqrt(float(products.user_sq_norm) * float(products.alignment_sq_norm))
        arm.observe(step, float(products.inner_product) / norms if norms else 0.0, float(alignment.last_loss))


def evaluate(
    arm: Arm, model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, args: argparse.Namespace
) -> Arm:
    """Judge a model by held-out rows, and return its arm with what was found."""
    with tqdm(total=3, desc=f"{arm.name}: judging") as bar:
        replies = generate(model, tokenizer, [turn.prompt for turn in data.unsafe], REPLY_TOKENS)
        bar.update()
        over_refusal, _ = refusal_rate(model, tokenizer, data.lookalikes)
        bar.update()
        questions, answers = [turn.prompt for turn in data.task], [turn.response for turn in data.task]
        accuracy, _ = task_accuracy(model, tokenizer, questions, answers)
        bar.update()
    arm.evaluation = Evaluation([*map(is_refusal, replies)], accuracy, over_refusal, replies)
    if isinstance(model, PeftModel):
        arm.kl_to_reference = kl_to_reference(model, tokenizer, data, args)
    return arm


@torch.no_grad()
def kl_to_reference(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: Data, args: argparse.Namespace
) -> float:
    """Mean KL(reference || model) over the tokens of held-out refusals, in nats."""
    # A sample: the reference's logits for all held-out refusals would be most of the peak memory.
    held_out = batches(tokenizer, data.unsafe[:32], args)
    model.eval()
    total, tokens = 0.0, 0
    for batch in held_out:
        mask = batch.pop("labels")[:, 1:] != -100
        logits = model(**batch).logits[:, :-1][mask]
        with model.disable_adapter():
            ref_logits = model(**batch).logits[:, :-1][mask]
        total += kl_divergence(ref_logits, logits).item()
        tokens += len(logits)
    return total / tokens
