"""The real Hugging Face Trainer with the wrapper in its optimizer argument."""

import datasets
import pytest
import torch
import transformers

from safegrad_optim import KLAlignment, SafeGradOptimizer
from tests.models import padded, safety_rows, tiny_peft, trainable


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_takes_protected_steps_and_drives_the_schedule(accumulation, tmp_path):
    rows = safety_rows(8, seed=5)

    def train(rho):
        model = tiny_peft(torch.float32)
        alignment = KLAlignment(model, safety_rows(4))
        optimizer = SafeGradOptimizer(torch.optim.AdamW(trainable(model), lr=0.01), alignment, rho=rho)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            lr_scheduler_type="linear",
            max_grad_norm=0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=padded,
            optimizers=(optimizer, None),
        )
        trainer.train()
        assert optimizer.counts.steps == 6
        assert optimizer.counts.unprotected == 0
        assert optimizer.counts.negligible == 1  # the first step, at the reference
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
        alignment(trainable(model))
        return float(alignment.last_loss)

    # The alignment gradient is there and does its work: a larger weight keeps the model closer.
    assert train(rho=50.0) < 0.5 * train(rho=0.0)
