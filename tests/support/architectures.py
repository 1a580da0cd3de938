"""Small models of all architectures of transformers' causal language models."""

import contextlib

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.support.models import VOCABULARY

# Above, a model takes seconds.
MOST_PARAMETERS = 3_000_000
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "word_embed_proj_dim")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "d_ff")
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_SMALL = {
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_DEPTHS, 2),
    **dict.fromkeys(_HEADS, 2),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_LENGTHS, 64),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(
        ("head_dim", "v_head_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 16
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_key_value_heads"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **{"num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "initializer_range": 0.2,
}


# Those of transformers 5.24 that are left out, and why.
_SHAPES = "the common small sizes do not fit one another"
_LARGE = "has more than 3M parameters with the common small sizes"
_OTHER = "its config wants more than small sizes"
LEFT_OUT = {
    **dict.fromkeys(("AXK1", "AXK2", "Bamba", "CodeGen", "DeepseekV2", "DeepseekV3", "DeepseekV32"), _SHAPES),
    **dict.fromkeys(("Dots3Note", "GlmMoeDsa", "GPTJ", "GraniteMoeHybrid", "HYV4", "Mamba2"), _SHAPES),
    **dict.fromkeys(("MiniCPM3", "Musicgen", "MusicgenMelody", "Youtu", "Zamba2", "xLSTM"), _SHAPES),
    **dict.fromkeys(("Glm4MoeLite",), _SHAPES),
    **dict.fromkeys(("Blt", "Git", "Inkling2", "Inkling2Loop", "KimiLinear", "LongcatFlash"), _LARGE),
    **dict.fromkeys(("Phi4Multimodal", "RecurrentGemma", "RoCBert", "XLM", "Gemma3Conditional"), _LARGE),
    **dict.fromkeys(("GotOcr2Conditional", "MossTranscribeDiarizeConditional"), _LARGE),
    **dict.fromkeys(("CohereCompass", "Dbrx", "DiffLlama", "Dots1", "Gemma3n", "Gemma4Assistant"), _OTHER),
    **dict.fromkeys(("Gemma4UnifiedAssistant", "HunYuanDenseV1", "HunYuanMoEV1", "Lfm2Moe"), _OTHER),
    **dict.fromkeys(("Ministral", "Nemotron", "Reformer", "Xmod"), _OTHER),
    "Gemma3nConditional": "wants timm",
    **dict.fromkeys(("BailingHybrid", "FalconH1"), "takes more than 20 seconds"),
    "Phimoe": "refused: its router is another in eval mode than in training",
    "ProphetNet": "refused: its output head gets several streams of hidden states",
    "Rwkv": "refused: a forward pass rescales its weights in eval mode",
}


def architectures():
    """The classes of causal language models, by a short name."""
    every = MODEL_FOR_CAUSAL_LM_MAPPING.values()
    classes = [found[0] if isinstance(found, tuple) else found for found in every]
    return {_short(found.__name__): found for found in classes}


def _short(name):
    for ending in (
        "ForCausalLM",
        "WithLMHeadModel",
        "ModelWithLMHead",
        "LMHeadModel",
        "ForConditionalGeneration",
    ):
        if name.endswith(ending):
            return name.removesuffix(ending) + ("Conditional" if "Conditional" in ending else "")
    return name


def small_model(model_class):
    """A model of a class with few parameters, in fp32 and training mode."""
    config = model_class.config_class()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        known = part.to_dict()
        for name, value in _SMALL.items():
            if name == "pad_token_id" or known.get(name) is not None:
                # Some are properties that others make.
                with contextlib.suppress(Exception):
                    setattr(part, name, value)
        if getattr(part, "layer_types", None):
            with contextlib.suppress(AttributeError):
                part.layer_types = list(part.layer_types)[:2]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    return model_class(config).train()
