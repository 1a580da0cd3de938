"""Two steps of a tiny model in DeepSpeed ZeRO on one gloo rank; what it is run with says the stage."""

import os
import sys

import deepspeed
import torch
import transformers

from safegrad_optim import KLAlignment, SafeGradOptimizer

os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ.setdefault("MASTER_PORT", "29517")


def main():
    stage = int(sys.argv[1])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    rows = [{"input_ids": list(range(1, 9)), "labels": [-100] * 4 + list(range(5, 9))}] * 4
    deepspeed.init_distributed("gloo")
    optimizer = SafeGradOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), KLAlignment(model, rows, batch_size=2)
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ids = torch.randint(1, 64, (2, 8))
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


if __name__ == "__main__":
    main()
