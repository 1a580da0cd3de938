"""QLoRA: TRL's SFTTrainer on nf4 weights with gradient checkpointing, protected."""

import datasets
import peft
import pytest
import torch
import transformers
import trl
from safetensors.torch import load_file

from safegrad_optim import KLAlignment, Reference
from safegrad_optim.integrations.transformers import protect_trainer
from safegrad_optim.safety_data import safety_rows
from tests.integrations.test_trl import SAFETY, USER, arguments, conversations, tiny_tokenizer
from tests.integrations.test_trl_trainers import require_exact_steps
from tests.support.models import in_four_bits, perturb, tiny_model, trainable

pytest.importorskip("bitsandbytes")
# Of bitsandbytes, TRL and transformers, of where 4 bits run and of what will be renamed.
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TOKENIZER = tiny_tokenizer()
ROWS = safety_rows(conversations(SAFETY), TOKENIZER)


@pytest.fixture
def four_bit(tmp_path):
    """Loads a tiny model in nf4, as a user does."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(TOKENIZER)}
    tiny_model(dtype=torch.float32, pad_token_id=0, **sizes).save_pretrained(tmp_path / "model")

    return lambda: in_four_bits(tmp_path / "model", bnb_4bit_use_double_quant=True)


def trainer_of(model, folder, max_steps):
    args = arguments(
        folder,
        max_steps=max_steps,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        lr_scheduler_type="constant",
        save_steps=2,
    )
    args.save_strategy = transformers.trainer_utils.SaveStrategy.STEPS
    torch.manual_seed(0)
    dataset = datasets.Dataset.from_list(conversations(USER * 4))
    lora = peft.LoraConfig(**LORA)
    return trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=TOKENIZER, peft_config=lora)


def test_each_step_is_the_exact_one(four_bit, tmp_path):
    trainer = trainer_of(four_bit(), tmp_path, 3)
    quantised = [module for module in trainer.model.modules() if type(module).__name__ == "Linear4bit"]
    assert quantised
    require_exact_steps(trainer, ROWS)
    assert trainer.model.is_gradient_checkpointing


def test_every_way_to_keep_the_reference_gives_the_same_gradient(four_bit):
    gradients = []
    for cache in ("hidden", "logits", None):
        torch.manual_seed(0)
        model = peft.get_peft_model(four_bit(), peft.LoraConfig(**LORA))
        alignment = KLAlignment(model, ROWS, reference=Reference(cache=cache))
        perturb(model, 0.1)
        gradients.append(torch.cat([grad.flatten() for grad in alignment(trainable(model))]))
    assert gradients[0].any()
    for other in gradients[1:]:
        # Hidden states are kept, and logits made, in bf16.
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0.02 * float(gradients[0].abs().max()))


def test_a_resumed_run_is_the_uninterrupted_one_and_its_adapter_loads(four_bit, tmp_path):
    folders = {name: tmp_path / name for name in ("whole", "parts")}

    def train(name, steps, resume=False):
        trainer = trainer_of(four_bit(), folders[name], steps)
        for parameter in trainable(trainer.model):
            # TRL makes adapters on 4 bits bf16, and PEFT fp32 at a resume: a bare run is not the same either.
            parameter.data = parameter.data.float()
        protect_trainer(trainer, ROWS, reference=Reference(resumed=resume))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return trainer

    whole = train("whole", 4)
    train("parts", 2)
    train("parts", 4, resume=True)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders.values())
    assert any(value.any() for name, value in one.items() if "lora_B" in name)
    assert all(torch.equal(one[name], other[name]) for name in one)

    loaded = peft.PeftModel.from_pretrained(four_bit(), folders["whole"])
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        trained, again = (model.train()(ids).logits.float() for model in (whole.model, loaded))
        torch.testing.assert_close(again, trained, rtol=0, atol=0.05 * float(trained.abs().max()))
        # Merged, the update is rounded to 4 bits along with the weights.
        merged = loaded.merge_and_unload().train()(ids).logits.float()
    assert merged.isfinite().all()
