"""The alignment gradient: that of a loss on safety batches, with the model left as it was.

In come a model and safety batches (inputs with `labels` that are -100 outside the response); out comes, at
each call, one gradient for each parameter, of KL(P_ref || P_model) or of a plain loss.

>>> import torch, transformers
>>> from safegrad_optim import KLAlignment
>>> config = transformers.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=8)
>>> model = transformers.GPT2LMHeadModel(config)
>>> alignment = KLAlignment(model, [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}])
>>> parameters = list(model.parameters())
>>> any(gradient.any() for gradient in alignment(parameters))  # nothing has moved yet
False
"""

from safegrad_optim.alignment._base import Alignment
from safegrad_optim.alignment._kl import KLAlignment
from safegrad_optim.alignment._loss import LossAlignment

__all__ = ["Alignment", "KLAlignment", "LossAlignment"]
