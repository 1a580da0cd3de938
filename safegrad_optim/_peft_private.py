"""What PEFT's layers say of themselves and its documentation does not; seen in peft 0.18 and 0.21."""

from typing import Any

from torch import Tensor, nn


def adapter_parameters(model: nn.Module) -> set[Tensor]:
    """Return the parameters of all adapters: `BaseTunerLayer.adapter_layer_names` names what holds them.

    Virtual tokens are held by a `prompt_encoder`, adaption prompts by the attention that they are in.
    """
    found: set[Tensor] = set()
    prompts = ("prompt_encoder", "adaption_prompt", "adaption_gate")
    for module in model.modules():
        for name in (*getattr(module, "adapter_layer_names", ()), *prompts):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                found.update(part.parameters())
            elif isinstance(part, nn.Parameter):
                found.add(part)
    return found


def inits_that_move_weights(model: nn.Module) -> list[str]:
    """Return the initialisations of adapters that have moved a part of the base weights into them."""
    moving = ("pissa", "olora", "corda", "loftq", "lora_ga")
    configs = getattr(model, "peft_config", {})
    inits = [getattr(config, "init_lora_weights", None) for config in configs.values()]
    return [init for init in inits if isinstance(init, str) and init.startswith(moving)]


def is_merged(module: nn.Module) -> bool:
    """Return whether a module is a layer whose weights have an adapter added to them."""
    # Other libraries' modules may have a `merged` too.
    return hasattr(module, "adapter_layer_names") and bool(getattr(module, "merged", False))


def virtual_tokens(model: nn.Module) -> int:
    """Return how many positions a model puts before those of its inputs, as prompt tuning does."""
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(model, "_adapters_disabled", False):
        return 0
    # Those of prefix tuning are keys and values, and have no logits.
    return 0 if str(config.peft_type).endswith("PREFIX_TUNING") else int(config.num_virtual_tokens)
