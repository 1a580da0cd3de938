"""Progress bars over what takes minutes on large models, if tqdm is installed."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Sequence[Item], text: str | None) -> Iterable[Item]:
    """The items with a progress bar, if there is a text for it and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    progress: Iterable[Item] = tqdm(items, desc=text, unit="batch", disable=text is None)
    return progress
