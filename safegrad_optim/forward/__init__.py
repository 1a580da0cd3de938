"""Forward passes on safety batches: what a model gives at the compared tokens, leaving no trace in it.

In come a model and inputs; out come hidden states and logits at some positions. The contexts around passes
put training flags, plain attributes, buffers and random state back.
"""

from safegrad_optim.forward._one_function import require_one_function
from safegrad_optim.forward._outputs import Outputs, forward_at, output_head, require_inputs, sent
from safegrad_optim.forward._unchanged import autocast, unchanged_evaluation, unchanged_training

__all__ = ["Outputs", "autocast", "forward_at", "output_head", "require_inputs", "sent"]
__all__ += ["require_one_function", "unchanged_evaluation", "unchanged_training"]
