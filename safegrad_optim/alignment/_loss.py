"""LossAlignment: the alignment gradient of a plain loss, such as cross-entropy on refusals."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from safegrad_optim.alignment._base import Alignment
from safegrad_optim.batches import IGNORE_INDEX, Batch, SafetyBatches, SafetySource, SourceBatches
from safegrad_optim.forward import forward_at, sent


class LossAlignment(Alignment):
    """Gradient of a plain loss on safety batches, for the paper's ablation or an objective of your own.

    L_align = -(1 / T) sum_t log P_model(y_t | x_<t) over the T response tokens, or `loss_fn`.

    Args:
        model: the model being fine-tuned.
        safety_batches: as in `KLAlignment`; the labels are the refusals to keep.
        loss_fn: called with the model, its dropout and kin off, and a whole batch on its device, also with
            several ranks; returns a 0-dim loss. By default the cross-entropy of the labels.
        batch_size, seed, autocast_dtype: as in `KLAlignment`.

    Raises:
        ValueError: empty or malformed safety batches, or one without a response token.
        NotImplementedError: the model is parallel in a way that is not supported.

    Reference: Yi et al., arXiv 2508.07172, section 5 (cross-entropy against KL alignment).
    """

    def __init__(
        self,
        model: nn.Module,
        safety_batches: SafetyBatches,
        loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None,
        *,
        batch_size: int = 8,
        seed: int = 0,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        source = SafetySource(rows=safety_batches, batch_size=batch_size)
        super().__init__(model, [SourceBatches(source, seed)], autocast_dtype)
        self.loss_fn = loss_fn

    def _losses(self, indices: Sequence[int]) -> Iterator[Tensor]:
        (source,), (index,) = self._sources, indices
        if self.loss_fn is not None:
            device = self._device()
            batch = {name: value.to(device) for name, value in source.batches[index].items()}
            yield self.loss_fn(self.model, batch)
            return
        tokens = source.tokens(index) / self._share.size
        for part in self._parts(source, index):
            logits = forward_at(self.model, part.inputs, part.mask).logits
            # The label of the token that each kept position predicts.
            targets = sent(part.labels.roll(-1, dims=1)[part.mask], logits.device)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = nn.functional.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            yield total * part.sections[0].weight / tokens
