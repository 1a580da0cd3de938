"""What a model in training draws random numbers by, switched off."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from safegrad_optim._torch_private import is_dropout, is_fixed_by_mode, is_plain_layer

# Dropout of attention, layers and paths, jitter of routers, noise on embeddings: rates that modules, and
# their configs, hold as numbers and read where they are in training.
_RATE = re.compile("drop|jitter|noise")


def switch_off(modules: Iterable[nn.Module]) -> None:
    """Set all rates of random changes to 0, and have normalisation use its running statistics."""
    for module in modules:
        attributes: dict[str, Any] = vars(module)
        if is_dropout(module):
            module.training = False
            # Attention reads the rate of a dropout that it does not call.
            attributes["p"] = 0.0
        elif is_fixed_by_mode(module):
            module.training = False
        elif not is_plain_layer(module):
            _to_zero(attributes)
            if hasattr(attributes.get("config"), "__dict__"):
                _to_zero(vars(attributes["config"]))


def _to_zero(attributes: dict[str, Any]) -> None:
    for name in [name for name, value in attributes.items() if type(value) is float and value > 0.0]:
        if _RATE.search(name):
            attributes[name] = 0.0
