"""Models with random weights, made on the device in the shapes of known ones, and steps to train them by."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer, SafetySource

__all__ = ["RECIPE", "SHAPES", "Rows", "Setup", "lora", "model_of", "quantised"]


class Shape(NamedTuple):
    """What a Llama is made of."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "8B": Shape(4096, 32, 14336, 32, 8, 128256),
    "1B": Shape(2048, 16, 8192, 32, 8, 128256),
    "135M": Shape(576, 30, 1536, 9, 3, 49152),
    "tiny": Shape(64, 2, 128, 4, 2, 512),
}


class Rows(NamedTuple):
    """Safety rows of one source: how many a step, how long, of which so many tokens are compared."""

    rows: int
    tokens: int
    compared: int
    weight: float = 1.0


# As `safety_sources` makes them, with the mean lengths of the shipped requests.
RECIPE = (Rows(2, 48, 5, 2.5), Rows(2, 48, 2, 1.0), Rows(2, 64, 5, 2.5), Rows(2, 96, 5, 5.0))
BATCHES = 4


def model_of(shape: str, device: str, dtype: torch.dtype) -> Any:
    """A causal language model with random weights."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


def lora(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model with fresh adapters, r = 8 on q, k and v."""
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)


def quantised(model: Any) -> Any:
    """The model with its linear layers, but for the head, in nf4; needs bitsandbytes."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit  # optional

    for module in model.model.layers.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear):
                four_bit = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=layer.weight.dtype,
                    quant_type="nf4",
                )
                device = layer.weight.device
                four_bit.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, four_bit.to(device))
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


class Setup:
    """One model and its user batch, of which arms take steps."""

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        self.model = model
        self.device = str(next(model.parameters()).device)
        self.vocabulary = int(model.config.vocab_size)
        self.user = self._batch(rows, tokens)

    def plain(self, **options: Any) -> Callable[[], None]:
        """A step of AdamW."""
        return self._step(self._adamw(**options))

    def protected(
        self,
        sources: Iterable[Rows],
        *,
        refresh_every: int = 1,
        reference: Reference | None = None,
        **options: Any,
    ) -> Callable[[], None]:
        """A step of AdamW in the wrapper."""
        made = [
            SafetySource(rows=self.rows_of(source), weight=source.weight, batch_size=source.rows)
            for source in sources
        ]
        alignment = KLAlignment(self.model, made, reference=reference)
        return self._step(SafeGradOptimizer(self._adamw(**options), alignment, refresh_every=refresh_every))

    def _adamw(self, **options: Any) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-4, **options)

    def _step(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            self.model(**self.user).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _batch(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, self.vocabulary, (rows, tokens), device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def rows_of(self, source: Rows) -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(1, self.vocabulary, (BATCHES * source.rows, source.tokens))
        labels = ids.clone()
        labels[:, : source.tokens - source.compared] = -100
        return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
