"""The real SFTTrainer of TRL: a PEFT model that the user makes, and one that the trainer makes."""

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl

from safegrad_optim import KLAlignment, SafeGradOptimizer, UnprotectedStepError
from safegrad_optim.integrations.transformers import SafeGradCallback, safegrad_optimizer
from safegrad_optim.safety_data import safety_rows
from tests.support.models import tiny_model, trainable

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
USER = [("how do i open a door", "use the key"), ("billing or shipping", "billing"), ("the lock", "no key")]
SAFETY = [("how do i open the lock", "sorry i cannot help"), ("use a key", "no sorry")]

# TRL itself sets the old name of activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def tiny_tokenizer():
    words = sorted({word for pair in USER + SAFETY for text in pair for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(SPECIAL + words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversations(pairs):
    return [
        {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]}
        for a, b in pairs
    ]


def arguments(folder, config=trl.SFTConfig, max_steps=4, **options):
    return config(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )


def trainer_of(model, args, tokenizer, **options):
    dataset = datasets.Dataset.from_list(conversations(USER * 4))
    trainer = trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, **options)
    SafeGradCallback().add_to(trainer)
    return trainer


def model_of(tokenizer):
    return tiny_model(dtype=torch.float32, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id)


def test_both_ways_into_the_sft_trainer_take_the_same_protected_steps(tmp_path):
    tokenizer = tiny_tokenizer()
    safety = safety_rows(conversations(SAFETY), tokenizer)
    args = arguments(tmp_path, weight_decay=0.0, optim="adamw_torch")

    by_factory = trainer_of(
        model_of(tokenizer),
        args,
        tokenizer,
        peft_config=peft.LoraConfig(**LORA),
        optimizer_cls_and_kwargs=safegrad_optimizer(args, safety, refresh_every=2),
    )
    model = peft.get_peft_model(model_of(tokenizer), peft.LoraConfig(**LORA))
    model.load_state_dict(by_factory.model.state_dict())
    base = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.0)
    optimizer = SafeGradOptimizer(base, KLAlignment(model, safety), refresh_every=2)
    by_optimizers = trainer_of(model, args, tokenizer, optimizers=(optimizer, None))

    for trainer in (by_factory, by_optimizers):
        trainer.train()
        wrapper = trainer.optimizer.optimizer
        assert isinstance(wrapper, SafeGradOptimizer)
        assert isinstance(trainer.model, peft.PeftModel)
        assert (wrapper.counts.steps, wrapper.counts.unprotected) == (4, 0)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
        assert all("safegrad/cosine" in entry and "mean_token_accuracy" in entry for entry in logs)
        assert logs[1]["safegrad/alignment_kl"] > 0.0
    found, expected = by_factory.model.state_dict(), by_optimizers.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sft_trainer_without_the_wrapper_is_told(tmp_path):
    tokenizer = tiny_tokenizer()
    args = arguments(tmp_path)
    trainer = trainer_of(model_of(tokenizer), args, tokenizer, peft_config=peft.LoraConfig(**LORA))
    with pytest.raises(UnprotectedStepError, match="expected a SafeGradOptimizer"):
        trainer.train()
