"""What the cases share: when something counts as refused, and short training runs of tiny models."""

import re
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

import safegrad_optim
from tests.support.models import VOCABULARY

# The issues that mend the cases.
PART_I = "No silent loss of protection, I: who moves my parameters, which reference, which run"
PART_II = "No silent loss of protection, II: the alignment pass, rows, frameworks"

_PACKAGE = Path(safegrad_optim.__file__).parent
# A warning counts, because pytest makes an error of it.
_REFUSALS = (RuntimeError, ValueError, TypeError, UserWarning)


@contextmanager
def refused(match=""):
    """The block raises an error of the library's own."""
    try:
        yield
    except _REFUSALS as error:
        _check_own(error, match)
    else:
        raise AssertionError("nothing was refused")


@contextmanager
def right_or_refused(match=""):
    """What the block asserts holds, or it raises an error of the library's own."""
    try:
        yield
    except _REFUSALS as error:
        _check_own(error, match)


def _check_own(error, match):
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        raise error
    if not re.search(match, str(error)):
        raise AssertionError(f"{match!r} is not in the error: {error}") from error


def user_ids(seed=50, count=2, length=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def user_backward(model, seed=50, length=8, scale=1.0):
    """The user's forward and backward pass; return the loss."""
    model.train()
    ids = user_ids(seed, length=length)
    loss = model(input_ids=ids, labels=ids).loss
    (scale * loss).backward()
    return loss.item()


def take_steps(model, optimizer, count=3, seed=50, scale=1.0):
    for step in range(count):
        user_backward(model, seed + step, scale=scale)
        optimizer.step()
        optimizer.zero_grad()


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)
