"""What a model in training draws random numbers by, switched off."""

import re
from typing import Any

import torch
from torch import nn

# Dropout of attention, layers and paths, jitter of routers, noise on embeddings: rates that modules, and
# their configs, hold as numbers and read where they are in training.
_RATE = re.compile("drop|jitter|noise")
_BY_CLASS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


def switch_off(model: nn.Module) -> None:
    """Set all rates of random changes to 0, and have normalisation use its running statistics.

    Where gradients are off, checkpointing is too: it would warn that there is nothing to compute again for.
    """
    checkpoints = torch.is_grad_enabled()
    for module in model.modules():
        attributes: dict[str, Any] = vars(module)
        if isinstance(module, _BY_CLASS):
            module.training = False
            # Attention reads the rate of a dropout that it does not call.
            attributes.update({"p": 0.0} if "p" in attributes else {})
        if not checkpoints and attributes.get("gradient_checkpointing"):
            attributes["gradient_checkpointing"] = False
        _to_zero(attributes)
        if hasattr(attributes.get("config"), "__dict__"):
            _to_zero(vars(attributes["config"]))
        if "neftune_noise_alpha" in attributes:
            # The hook that adds the noise asks for the mode.
            module.training = False


def _to_zero(attributes: dict[str, Any]) -> None:
    for name in [name for name, value in attributes.items() if type(value) is float and value > 0.0]:
        if _RATE.search(name):
            attributes[name] = 0.0
