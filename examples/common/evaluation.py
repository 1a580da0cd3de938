"""How the quickstart judges a model, and what it observes of a step that SafeGrad does not touch."""

import argparse

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.quickstart_data import Data, batches
from common.report import Evaluation
from common.scoring import generate, refusal_rate, task_accuracy
from safegrad_optim import KLAlignment, inner_products, is_refusal, kl_divergence

# A refusal shows in its first words.
REPLY_TOKENS = 12

__all__ = ["evaluate", "kl_to_reference", "observation"]


def observation(parameters: list[nn.Parameter], alignment: KLAlignment) -> tuple[float, float]:
    """Cosine of user and alignment gradient, and KL, of a step that SafeGrad does not touch."""
    products = inner_products([parameter.grad for parameter in parameters], alignment([*parameters]))
    norms = (products.user_sq_norm * products.alignment_sq_norm).sqrt()
    return float(products.inner_product / norms) if norms > 0 else 0.0, float(alignment.last_loss)


def evaluate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, data: Data, name: str
) -> Evaluation:
    with tqdm(total=3, desc=f"{name}: judging") as bar:
        replies = generate(model, tokenizer, [turn.prompt for turn in data.unsafe], REPLY_TOKENS)
        bar.update()
        over_refusal, _ = refusal_rate(model, tokenizer, data.lookalikes)
        bar.update()
        questions, answers = [turn.prompt for turn in data.task], [turn.response for turn in data.task]
        accuracy, _ = task_accuracy(model, tokenizer, questions, answers)
        bar.update()
    return Evaluation([*map(is_refusal, replies)], accuracy, over_refusal, replies)


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
