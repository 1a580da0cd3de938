"""The Trainer logs what a check finds, and stops on a leak."""

import copy
import warnings

import datasets
import pytest
import torch

from safegrad_optim import KLAlignment, ProtectionCheck, ProtectionLostError, SafeGradOptimizer, safety_rows
from safegrad_optim.integrations.transformers import SafeGradCallback
from tests.integrations.test_trainer import KillAfterSaving, KilledError, arguments
from tests.support.attacked import ALL_UNSAFE, YES, turns
from tests.support.chat import TOKENIZER
from tests.support.models import padded, trainable

SHARES = ["refusal_kept", "refusal_kept_held_out_requests", "refusal_kept_training_prompts"]
METRICS = {f"safegrad/{name}" for name in [*SHARES, "over_refusal", "flipped"]}


def trainer_of(aligned, sources, folder, on_leak="warn", with_check=True, **options):
    """An attack with the alignment gradient off, so that refusals are lost within steps."""
    import transformers

    model = copy.deepcopy(aligned)
    optimizer = SafeGradOptimizer(
        torch.optim.Adam(trainable(model), lr=0.01), KLAlignment(model, sources), rho=0.0
    )
    rows = safety_rows(turns(ALL_UNSAFE, YES), TOKENIZER)
    args = arguments(
        folder, **{"max_steps": 12, "per_device_train_batch_size": 16, "logging_steps": 5} | options
    )
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=padded,
        optimizers=(optimizer, None),
    )
    check = ProtectionCheck(model, TOKENIZER, sources, on_leak=on_leak) if with_check else None
    SafeGradCallback(check).add_to(trainer)
    return trainer, check


def found_in(entry):
    return {name: value for name, value in entry.items() if name in METRICS}


def test_what_a_check_finds_is_logged_with_its_step_and_at_the_end(aligned, sources, tmp_path):
    trainer, check = trainer_of(aligned, sources, tmp_path)
    with pytest.warns(UserWarning, match="loses its refusals"):
        trainer.train()
    logged = {entry["step"]: found_in(entry) for entry in trainer.state.log_history if found_in(entry)}
    assert [found.step for found in check.history] == [5, 10, 12]
    expected = {f.step: {f"safegrad/{name}": v for name, v in f.metrics().items()} for f in check.history}
    assert logged == expected
    assert logged[12]["safegrad/refusal_kept"] < 0.5


@pytest.mark.parametrize("on_leak", ["stop", "raise"])
def test_a_leak_ends_the_training(aligned, sources, on_leak, tmp_path):
    trainer, check = trainer_of(aligned, sources, tmp_path, on_leak, max_steps=100)
    if on_leak == "raise":
        with pytest.raises(ProtectionLostError):
            trainer.train()
    else:
        with pytest.warns(UserWarning, match="loses its refusals"):
            trainer.train()
    first = next(found.step for found in check.history if found.leaks)
    assert trainer.state.global_step == first < 100


def test_a_resumed_check_goes_on_and_its_absence_is_said(aligned, sources, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}
    trainer, _ = trainer_of(aligned, sources, tmp_path, **options)
    trainer.add_callback(KillAfterSaving())
    with pytest.raises(KilledError):
        trainer.train()
    checkpoint = str(tmp_path / "checkpoint-4")
    trainer, check = trainer_of(aligned, sources, tmp_path, **options)
    check._aligned = torch.zeros_like(check._aligned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=checkpoint)
    assert check._aligned.any()
    assert [found.step for found in check.history] == [5, 6]
    trainer, _ = trainer_of(aligned, sources, tmp_path, with_check=False, **options)
    with pytest.warns(UserWarning, match="had a ProtectionCheck, and this one goes on without"):
        trainer.train(resume_from_checkpoint=checkpoint)
