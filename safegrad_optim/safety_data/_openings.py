"""How replies open: the distribution of the token behind a prompt, and how likely a reply is."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safegrad_optim.forward import Outputs, forward_at, unchanged_evaluation
from safegrad_optim.parallel import of_all_ranks, share_of, synchronized
from safegrad_optim.progress import shown
from safegrad_optim.reference import ReferenceSource

Prompts = Sequence[Sequence[int]]


def openings(
    source: ReferenceSource,
    prompts: Prompts,
    before: list[int],
    batch_size: int,
    of_distribution: Callable[[Tensor], Tensor] = lambda distribution: distribution,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what is asked of the distribution behind each prompt and `before`, and its hidden state."""
    rows = [[*prompt, *before] for prompt in prompts]

    def last(output: Outputs, _: list[int]) -> list[Tensor]:
        values = of_distribution(output.logits.float().softmax(dim=-1))
        return [values.cpu(), output.hidden.to(torch.bfloat16).cpu()]

    values, states = _of_last_positions(source, rows, [1] * len(rows), batch_size, last, progress)
    return values, states


def reply_log_probs(
    source: ReferenceSource, prompts: Prompts, replies: Prompts, batch_size: int, progress: str | None = None
) -> Tensor:
    """Return the log-probability of each reply behind its prompt, (prompts,)."""
    # The last token of a reply predicts none of it.
    rows = [[*prompt, *reply[:-1]] for prompt, reply in zip(prompts, replies, strict=True)]

    def of_replies(output: Outputs, indices: list[int]) -> list[Tensor]:
        log_probs = output.logits.float().log_softmax(dim=-1)
        tokens = torch.tensor([token for index in indices for token in replies[index]])
        chosen = log_probs.gather(1, tokens.to(log_probs.device)[:, None]).squeeze(1)
        sums = [part.sum() for part in chosen.split([len(replies[index]) for index in indices])]
        return [torch.stack(sums).cpu()]

    positions = [len(reply) for reply in replies]
    (found,) = _of_last_positions(source, rows, positions, batch_size, of_replies, progress)
    return found


@torch.no_grad()
def _of_last_positions(
    source: ReferenceSource,
    rows: Prompts,
    positions: Sequence[int],
    batch_size: int,
    of_output: Callable[[Outputs, list[int]], list[Tensor]],
    progress: str | None,
) -> list[Tensor]:
    """Return what is asked of the last positions of each row, so many of each.

    On the CPU, in the order of the rows. Each rank takes its share of the batches, and as many passes as any
    other.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    share = share_of(source.model)
    passes = range(share.rank, -(-len(batches) // share.size) * share.size, share.size)
    found: dict[int, list[Tensor]] = {}
    with source.open() as model, synchronized(model), unchanged_evaluation(model):
        for number in shown(passes, progress):
            chosen = min(number, len(batches) - 1)
            texts = [torch.tensor(rows[index]) for index in batches[chosen]]
            lengths = torch.tensor([len(text) for text in texts])[:, None]
            ids = pad_sequence(texts, batch_first=True)
            places = torch.arange(ids.shape[1])
            inputs = {"input_ids": ids, "attention_mask": (places < lengths).long()}
            asked = torch.tensor([positions[index] for index in batches[chosen]])[:, None]
            mask = (places < lengths) & (places >= lengths - asked)
            values = of_output(forward_at(model, inputs, mask), batches[chosen])
            if not values[0].isfinite().all():
                raise ValueError(
                    f"The model gives probabilities that are not finite behind {len(texts)} prompts of up to "
                    f"{ids.shape[1]} tokens. Check its weights and precision."
                )
            found[chosen] = values
    for theirs in of_all_ranks(found):
        found |= theirs
    in_order = torch.tensor(order).argsort()
    kept = [found[number] for number in range(len(batches))]
    return [torch.cat(values)[in_order] for values in zip(*kept, strict=True)]
