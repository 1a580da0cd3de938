"""What this process has trained: it cannot become a reference without a word."""

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Of each parameter under training, the weights that its model had as the reference.
_BEFORE_TRAINING = WeakIdKeyDictionary()


def remember(named: Iterable[tuple[str, Tensor]], weights: str) -> None:
    """Remember that a model, whose parameters are named, is trained from a reference of these weights on."""
    for _, parameter in named:
        _BEFORE_TRAINING.setdefault(parameter, weights)


def require_untrained(named: Iterable[tuple[str, Tensor]], weights: str) -> None:
    """Refuse weights that training in this process, or a merge of what it trained, has changed."""
    before = {_BEFORE_TRAINING[parameter] for _, parameter in named if parameter in _BEFORE_TRAINING}
    if before - {weights}:
        raise ValueError(
            "The model was fine-tuned in this process, under another alignment, and its present weights are "
            "others than those that were the reference then. Give the aligned model as "
            "Reference(ref_model=...); or, if this is the aligned model, Reference(trained_here=True)."
        )
