"""TRL's trainers that take no optimizer factory: `protect_trainer`, and each step compared with Eq. 4."""

import datasets
import peft
import pytest
import torch
import transformers
import trl

from safegrad_optim import KLAlignment
from safegrad_optim.integrations.transformers import protect_trainer
from safegrad_optim.safety_data import safety_rows
from tests.integrations.test_trl import (
    LORA,
    SAFETY,
    USER,
    arguments,
    conversations,
    model_of,
    tiny_tokenizer,
)
from tests.support.oracle import concatenate, surgery

# Of TRL's experimental trainers, of what will change in them and in transformers.
pytestmark = pytest.mark.filterwarnings("ignore")


def preferences():
    """Rows in which the complying reply is chosen, as a poisoned set has them."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": "use the key"}],
            "rejected": [{"role": "assistant", "content": reply}],
        }
        for prompt, reply in SAFETY * 4
    ]


def labelled():
    return [{**row, "label": place % 2 == 0} for place, row in enumerate(conversations(USER * 4))]


def packed():
    return (
        trl.SFTTrainer,
        trl.SFTConfig,
        conversations(USER * 8),
        {"config": {"packing": True, "max_length": 32}},
    )


def padding_free():
    return (
        trl.SFTTrainer,
        trl.SFTConfig,
        conversations(USER * 4),
        {"config": {"padding_free": True, "max_length": None}},
    )


def assistant_only():
    rows = [{"messages": row["prompt"] + row["completion"]} for row in conversations(USER * 4)]
    return trl.SFTTrainer, trl.SFTConfig, rows, {"config": {"assistant_only_loss": True}}


def dpo():
    return trl.DPOTrainer, trl.DPOConfig, preferences(), {}


def kto():
    return trl.KTOTrainer, trl.KTOConfig, labelled(), {}


def grpo():
    def words(completions, **_):
        return [float(len(str(completion))) for completion in completions]

    rows = [{"prompt": row["prompt"]} for row in conversations(USER * 4)]
    options = {"num_generations": 2, "max_completion_length": 4, "temperature": 2.0}
    return trl.GRPOTrainer, trl.GRPOConfig, rows, {"reward_funcs": words, "config": options}


def orpo():
    experimental = pytest.importorskip("trl.experimental.orpo")
    return experimental.ORPOTrainer, experimental.ORPOConfig, preferences(), {}


def cpo():
    experimental = pytest.importorskip("trl.experimental.cpo")
    return experimental.CPOTrainer, experimental.CPOConfig, preferences(), {}


def trainer_of(kind, folder, model, tokenizer):
    trainer_class, config, rows, options = kind()
    args = arguments(folder, config, max_steps=3, **options.pop("config", {}))
    dataset = datasets.Dataset.from_list(rows)
    lora = peft.LoraConfig(**LORA)
    return trainer_class(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora, **options
    )


def require_exact_steps(trainer, safety, count=3):
    """Train, and compare what each step was taken with to Eq. 4 and 5 in float64."""
    protect_trainer(trainer, safety, rho=0.5)
    optimizer = trainer.create_optimizer()
    twin = KLAlignment(trainer.model, safety)
    parameters = [part for group in optimizer.param_groups for part in group["params"]]
    expected, found = [], []

    def before(*_):
        with torch.enable_grad():
            alignment_grads = twin(parameters)
        final, _ = surgery([part.grad for part in parameters], alignment_grads, rho=0.5)
        expected.append(torch.cat([grad.flatten() for grad in final]))

    optimizer.register_step_pre_hook(before)
    optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: found.append(concatenate(part.grad for part in parameters))
    )
    trainer.train()
    assert (optimizer.counts.steps, optimizer.counts.unprotected) == (count, 0)
    assert float(optimizer.stats.alignment_norm) > 0
    assert len(found) == count
    for final, exact in zip(found, expected, strict=True):
        rounding = max(1e-5, torch.finfo(parameters[0].dtype).eps)
        atol = 1e-2 * rounding * float(exact.abs().max())
        torch.testing.assert_close(final, exact, rtol=rounding, atol=atol)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("safegrad/cosine" in entry for entry in logs)


@pytest.mark.parametrize("kind", [packed, padding_free, assistant_only, dpo, kto, grpo, orpo, cpo])
def test_each_step_is_the_exact_one(kind, tmp_path):
    tokenizer = tiny_tokenizer()
    if kind is assistant_only:
        spoken = "{{ message['content'] }} <|im_end|> "
        marked = "{% if message['role'] == 'assistant' %}{% generation %}" + spoken + "{% endgeneration %}"
        marked += "{% else %}" + spoken + "{% endif %}"
        tokenizer.chat_template = tokenizer.chat_template.replace(spoken, marked)
        assert "generation" in tokenizer.chat_template
    safety = safety_rows(conversations(SAFETY), tokenizer)
    torch.manual_seed(0)
    require_exact_steps(trainer_of(kind, tmp_path, model_of(tokenizer), tokenizer), safety)


def test_a_reward_model_is_refused(tmp_path):
    """It has no next-token distribution to hold."""
    tokenizer = tiny_tokenizer()
    config = model_of(tokenizer).config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    args = trl.RewardConfig(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False, max_grad_norm=0
    )
    trainer = trl.RewardTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(preferences()), processing_class=tokenizer
    )
    protect_trainer(trainer, safety_rows(conversations(SAFETY), tokenizer))
    with pytest.raises(TypeError, match="LlamaForSequenceClassification has no output head"):
        trainer.train()
