"""Tiny models and safety rows for tests: the real architectures, seconds to run."""

import peft
import torch
import transformers

VOCABULARY = 61


def tiny_model(architecture="Llama", dtype=torch.float64, seed=0, **options):
    # Weights ten times the usual, so that a model without training tells tokens apart.
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    if architecture == "GPT2":
        common |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    else:
        common |= {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
    if architecture == "Gemma2":
        common |= {"head_dim": 8, "final_logit_softcapping": 0.05}
    config = getattr(transformers, f"{architecture}Config")(**common | options)
    torch.manual_seed(seed)
    name = "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    return getattr(transformers, name)(config).to(dtype)


def tiny_peft(dtype=torch.float64, seed=0, model=None, **lora):
    model = model if model is not None else tiny_model(dtype=dtype, seed=seed, tie_word_embeddings=False)
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | lora
    torch.manual_seed(seed + 1)
    return peft.get_peft_model(model, peft.LoraConfig(**options)).to(dtype)


def safety_rows(count=5, seed=0):
    """Rows of different lengths: a prompt, then a response that alone is labelled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        prompt, response = 3 + index % 3, 2 + index % 4
        ids = torch.randint(3, VOCABULARY, (prompt + response,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def padded(rows, left=0, right=0):
    """One batch of the rows, with so many columns of padding beyond the longest row."""
    length = max(len(row["input_ids"]) for row in rows) + right
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        size = len(row["input_ids"])
        for name, values, fill in (
            ("input_ids", row["input_ids"], 7),
            ("attention_mask", [1] * size, 0),
            ("labels", row["labels"], -100),
        ):
            batch[name].append([fill] * left + list(values) + [fill] * (length - size))
    return {name: torch.tensor(values) for name, values in batch.items()}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def perturb(model, scale=0.3, seed=9):
    """Stand-in for fine-tuning: move every trainable parameter, and as if no one had written to it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(scale * noise.to(parameter.dtype))


def in_four_bits(folder, **options):
    """A saved model with nf4 weights, computed in bf16 on the CPU, as a user loads it."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **options
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
