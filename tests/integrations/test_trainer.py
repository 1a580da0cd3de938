"""The real Hugging Face Trainer: the wrapper in its optimizer arguments, and the callback's metrics."""

import types

import datasets
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from safegrad_optim import (
    KLAlignment,
    LossAlignment,
    Reference,
    SafeGradOptimizer,
    SurgeryStats,
    UnprotectedStepError,
)
from safegrad_optim.integrations.transformers import SafeGradCallback, safegrad_optimizer
from tests.support.models import padded, safety_rows, tiny_model, tiny_peft, trainable

MODELS = {
    "LoRA": lambda: tiny_peft(torch.float32, lora_dropout=0.1),
    "DoRA": lambda: tiny_peft(torch.float32, use_dora=True),
    "full": lambda: tiny_model(dtype=torch.float32),
}
MEANS = ["cosine", "user_norm", "alignment_norm", "final_norm"]

RESUMED = {"reference": Reference(resumed=True)}


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**defaults | options)


def trainer_of(model, args, **options):
    rows = datasets.Dataset.from_list(safety_rows(10, seed=5))
    return transformers.Trainer(model, args, train_dataset=rows, data_collator=padded, **options)


def plain_optimizer(model, args):
    return trainer_of(model, args).create_optimizer()


def options_for(path, model, args, alignment=None, **options):
    """What hands a SafeGradOptimizer with the Trainer's own AdamW to the Trainer, on either path."""
    alignment = alignment or {}
    if path == "factory":
        made = safegrad_optimizer(args, safety_rows(12), batch_size=4, **alignment, **options)
        return {"optimizer_cls_and_kwargs": made}
    kl_alignment = KLAlignment(model, safety_rows(12), batch_size=4, **alignment)
    return {"optimizers": (SafeGradOptimizer(plain_optimizer(model, args), kl_alignment, **options), None)}


def safegrad_logs(trainer):
    """The callback's metrics by step, of all training logs."""
    return {
        entry["step"]: {name: value for name, value in entry.items() if name.startswith("safegrad/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    }


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def assert_same_weights(found, expected):
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Spy(transformers.TrainerCallback):
    """What each step saw, read at once."""

    def __init__(self):
        self.steps = []

    def on_optimizer_step(self, *_, optimizer, **kwargs):
        alignment = optimizer.optimizer.alignment
        self.steps.append(optimizer.optimizer.stats.to_dict() | {"kl": float(alignment.last_loss)})


class KilledError(Exception):
    pass


class KillAfterSaving(transformers.TrainerCallback):
    def on_save(self, *_, **kwargs):
        raise KilledError


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_takes_protected_steps_and_drives_the_schedule(accumulation, tmp_path):
    def train(rho):
        model = tiny_peft(torch.float32)
        alignment = KLAlignment(model, safety_rows(4))
        optimizer = SafeGradOptimizer(torch.optim.AdamW(trainable(model), lr=0.01), alignment, rho=rho)
        args = arguments(
            tmp_path,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        trainer_of(model, args, optimizers=(optimizer, None)).train()
        assert optimizer.counts.steps == 6
        assert optimizer.counts.unprotected == 0
        assert optimizer.counts.negligible == 1  # the first step, at the reference
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
        alignment(trainable(model))
        return float(alignment.last_loss)

    # The alignment gradient is there and does its work: a larger weight keeps the model closer.
    assert train(rho=50.0) < 0.5 * train(rho=0.0)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "sgd", "adafactor"])
def test_factory_makes_the_optimizer_that_the_arguments_describe(optim, tmp_path):
    model = tiny_model(dtype=torch.float32)
    args = arguments(tmp_path, optim=optim, weight_decay=0.1, adam_beta2=0.9, adam_epsilon=1e-6)
    plain = plain_optimizer(model, args)
    made = safegrad_optimizer(args, safety_rows(4), rho=0.5, refresh_every=3, max_grad_norm=2.0)
    optimizer = trainer_of(model, args, optimizer_cls_and_kwargs=made).create_optimizer()

    assert isinstance(optimizer, SafeGradOptimizer)
    assert (optimizer.rho, optimizer.refresh_every, optimizer.max_grad_norm) == (0.5, 3, 2.0)
    base = optimizer.base_optimizer
    assert type(base) is type(plain)
    assert base.defaults.items() >= plain.defaults.items()
    for group, expected in zip(base.param_groups, plain.param_groups, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(p) for p in expected["params"]]
        assert {key: group[key] for key in group if key != "params"} == {
            key: expected[key] for key in expected if key != "params"
        }
    assert [group["weight_decay"] for group in base.param_groups] == [0.1, 0.0]
    assert all(group["params"] for group in base.param_groups)


@pytest.mark.parametrize("kind", MODELS)
def test_both_paths_take_the_same_trajectory(kind, tmp_path):
    def train(path):
        model = MODELS[kind]()
        args = arguments(tmp_path, weight_decay=0.1)
        file = tmp_path / f"{path}.safetensors"
        cache = {"reference": Reference(file=file)}
        trainer = trainer_of(model, args, **options_for(path, model, args, cache, refresh_every=2))
        SafeGradCallback().add_to(trainer)
        trainer.train()
        assert file.exists()
        return weights(model), safegrad_logs(trainer)

    found, found_logs = train("factory")
    expected, expected_logs = train("optimizers")
    assert_same_weights(found, expected)
    assert found_logs == expected_logs


@pytest.mark.parametrize("kind", ["LoRA", "full"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_trajectory(kind, tmp_path):
    def train(checkpointing):
        model = MODELS[kind]()
        args = arguments(tmp_path, gradient_checkpointing=checkpointing)
        trainer = trainer_of(model, args, **options_for("factory", model, args))
        trainer.train()
        assert model.is_gradient_checkpointing is checkpointing
        return weights(model)

    assert_same_weights(train(True), train(False))


@pytest.mark.parametrize("kind", ["LoRA", "full"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["factory", "optimizers"])
def test_bf16_reference_is_in_the_precision_of_training(kind, model_dtype, path, tmp_path):
    model = MODELS[kind]().to(model_dtype)
    args = arguments(tmp_path, bf16=True)
    alignment = {} if path == "factory" else {"autocast_dtype": torch.bfloat16}
    trainer = trainer_of(model, args, **options_for(path, model, args, alignment))
    SafeGradCallback().add_to(trainer)
    trainer.train()
    first = safegrad_logs(trainer)[1]
    assert (first["safegrad/alignment_kl"], first["safegrad/alignment_norm"]) == (0.0, 0.0)
    assert trainer.optimizer.optimizer.counts.negligible == 1
    cache = trainer.optimizer.optimizer.alignment.cache
    assert (cache.kind, bool(cache.head)) == ("hidden", kind == "full")


@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_bf16_with_a_reference_outside_autocast_raises(kind, tmp_path):
    model = MODELS[kind]()
    args = arguments(tmp_path, bf16=True)
    with pytest.raises(RuntimeError, match="autocast_dtype"):
        trainer_of(model, args, **options_for("optimizers", model, args)).train()


def test_metrics_are_means_over_the_logging_interval_and_reach_reporters(tmp_path):
    model = MODELS["LoRA"]()
    args = arguments(tmp_path, max_steps=9, logging_steps=3, report_to=["tensorboard"])
    trainer = trainer_of(model, args, **options_for("factory", model, args, refresh_every=2))
    spy = Spy()
    trainer.add_callback(spy)
    SafeGradCallback().add_to(trainer)
    trainer.train()

    logs = safegrad_logs(trainer)
    assert list(logs) == [3, 6, 9]
    for step, found in logs.items():
        steps = spy.steps[step - 3 : step]
        expected = {name: sum(values[name] for values in steps) / 3 for name in MEANS}
        expected["conflict_rate"] = sum(values["conflict"] for values in steps) / 3
        # The gradient drawn at the reference, by the first step, is zero and serves no other.
        drawn = [spy.steps[index]["kl"] for index in range(step - 3, step) if index in (0, 1, 3, 5, 7)]
        expected["alignment_kl"] = sum(drawn) / len(drawn)
        expected |= {"unprotected_steps": 0, "skipped_steps": 0}
        assert found == {f"safegrad/{name}": value for name, value in expected.items()}
    assert len({found["safegrad/conflict_rate"] for found in logs.values()}) > 1
    assert not any("safegrad/cosine" in entry for entry in trainer.state.log_history if "loss" not in entry)

    (events,) = tmp_path.glob("runs/*/events*")
    board = EventAccumulator(str(events)).Reload()
    for name in next(iter(logs.values())):
        written = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert written == pytest.approx({step: found[name] for step, found in logs.items()}, rel=1e-6)


def test_evaluation_logs_stay_as_they_are(tmp_path):
    model = MODELS["LoRA"]()
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    options = options_for("factory", model, args)
    trainer = trainer_of(model, args, eval_dataset=datasets.Dataset.from_list(safety_rows(4)), **options)
    SafeGradCallback().add_to(trainer)
    trainer.train()
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 3  # two evaluations and the summary
    assert not any(name.startswith("safegrad/") for entry in others for name in entry)


def test_draws_are_logged_where_they_happen(tmp_path):
    model = MODELS["LoRA"]()
    args = arguments(tmp_path, max_steps=6)
    trainer = trainer_of(model, args, **options_for("factory", model, args, refresh_every=4))
    SafeGradCallback().add_to(trainer)
    trainer.train()
    logs = safegrad_logs(trainer)
    assert [step for step in logs if "safegrad/alignment_kl" in logs[step]] == [1, 2, 6]


@pytest.mark.parametrize("alignment", [None, LossAlignment])
def test_metrics_without_kl(alignment, tmp_path):
    model = MODELS["LoRA"]()
    made = alignment and alignment(model, safety_rows(4))
    base = torch.optim.AdamW(trainable(model), lr=0.01)
    optimizer = SafeGradOptimizer(base, made, allow_unprotected=True)
    trainer = trainer_of(model, arguments(tmp_path, max_steps=2), optimizers=(optimizer, None))
    SafeGradCallback().add_to(trainer)
    trainer.train()
    last = safegrad_logs(trainer)[2]
    if alignment is None:
        assert last == {"safegrad/unprotected_steps": 2, "safegrad/skipped_steps": 0}
    else:
        assert last["safegrad/alignment_loss"] == float(made.last_loss)
        assert "safegrad/alignment_kl" not in last


def test_a_step_reads_nothing_back_and_skipped_steps_are_counted(tmp_path):
    model = MODELS["LoRA"]()
    args = arguments(tmp_path)
    trainer = trainer_of(model, args, **options_for("optimizers", model, args))
    callback = SafeGradCallback()
    wrapped = types.SimpleNamespace(optimizer=trainer.optimizer, step_was_skipped=False)
    callback.on_train_begin(args, trainer.state, trainer.control, optimizer=wrapped)
    for _ in range(3):
        # Tensors without values: whatever reads one raises.
        nothing = torch.zeros((), dtype=torch.float64, device="meta")
        trainer.optimizer._own.stats = SurgeryStats(*[nothing.clone() for _ in SurgeryStats._fields])
        trainer.optimizer.alignment.last_loss = torch.zeros((), device="meta")
        callback.on_optimizer_step(args, trainer.state, trainer.control, optimizer=wrapped)
    with pytest.raises(NotImplementedError, match="meta"):
        callback.state()

    callback._clear()
    wrapped.step_was_skipped = True
    callback.on_optimizer_step(args, trainer.state, trainer.control, optimizer=wrapped)
    logs = {"loss": 0.5}
    trainer.state.log_history.append(dict(logs))
    callback.on_log(args, trainer.state, trainer.control, logs=logs)
    expected = {"loss": 0.5, "safegrad/unprotected_steps": 0, "safegrad/skipped_steps": 1}
    assert logs == trainer.state.log_history[-1] == expected


def test_training_without_the_wrapper_raises(tmp_path):
    trainer = trainer_of(MODELS["LoRA"](), arguments(tmp_path), callbacks=[SafeGradCallback()])
    before = weights(trainer.model)
    with pytest.raises(UnprotectedStepError, match=r"optimizer is a AdamW, expected a SafeGradOptimizer"):
        trainer.train()
    assert_same_weights(weights(trainer.model), before)


def test_deepspeed_raises(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed_plugin = object()
    with pytest.raises(NotImplementedError, match="uses DeepSpeed"):
        safegrad_optimizer(args, safety_rows(4))
    with pytest.raises(NotImplementedError, match="uses DeepSpeed"):
        SafeGradCallback().on_train_begin(args, None, None, optimizer=None)


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_optimizers_that_step_during_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim='{optim}' updates each layer during the backward pass"):
        safegrad_optimizer(arguments(tmp_path, optim=optim), safety_rows(4))


def test_clipping_by_the_trainer_warns(tmp_path):
    args = arguments(tmp_path, max_grad_norm=1.0, max_steps=1)
    with pytest.warns(UserWarning, match="max_grad_norm=1.0 of the TrainingArguments clips"):
        made = safegrad_optimizer(args, safety_rows(4))
    trainer = trainer_of(
        MODELS["LoRA"](), args, optimizer_cls_and_kwargs=made, callbacks=[SafeGradCallback()]
    )
    with pytest.warns(UserWarning, match="Set max_grad_norm=0 there"):
        trainer.train()


def test_callback_behind_reporters_warns(tmp_path):
    model = MODELS["LoRA"]()
    args = arguments(tmp_path, max_steps=1, report_to=["tensorboard"])
    options = options_for("factory", model, args)
    trainer = trainer_of(model, args, callbacks=[SafeGradCallback()], **options)
    with pytest.warns(UserWarning, match=r"call SafeGradCallback\(\)\.add_to\(trainer\)"):
        trainer.train()
    assert "safegrad/cosine" in safegrad_logs(trainer)[1]


def run(kind, path, folder, checkpoint=None, kill=False, refresh_every=1, alignment=None, **extra):
    """Train 9 steps, saving at step 5, killed there or resumed from there; the model starts anew."""
    model = MODELS[kind]()
    args = arguments(folder, max_steps=9, logging_steps=3, save_strategy="steps", save_steps=5, **extra)
    options = options_for(path, model, args, alignment, refresh_every=refresh_every)
    trainer = trainer_of(model, args, **options)
    SafeGradCallback().add_to(trainer)
    if kill:
        trainer.add_callback(KillAfterSaving())
        with pytest.raises(KilledError):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    return weights(model), safegrad_logs(trainer), trainer.optimizer.optimizer.counts


@pytest.mark.parametrize("refresh_every", [1, 4])
@pytest.mark.parametrize("path", ["factory", "optimizers"])
@pytest.mark.parametrize("kind", ["LoRA", "full"])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(kind, path, refresh_every, tmp_path):
    # Step 5 is inside a logging interval, inside an epoch, and between two refreshes.
    file = tmp_path / "reference.safetensors"
    alignment = {"reference": Reference(file=file)}
    options = {"refresh_every": refresh_every, "alignment": alignment}
    expected = run(kind, path, tmp_path / "whole", **options)
    run(kind, path, tmp_path / "cut", kill=True, **options)
    # The factory comes after the checkpoint's weights have been loaded.
    alignment["reference"] = Reference(file=file, resumed=path == "factory")
    found = run(kind, path, tmp_path / "cut", tmp_path / "cut" / "checkpoint-5", **options)
    assert list(found[1]) == [3, 6, 9]
    assert found[1:] == expected[1:]
    assert_same_weights(found[0], expected[0])


def test_callback_that_the_trainer_replaces_goes_on_where_it_was(tmp_path):
    options = {
        "restore_callback_states_from_checkpoint": True,
        "alignment": RESUMED,
    }
    expected = run("LoRA", "factory", tmp_path / "whole", **options)
    run("LoRA", "factory", tmp_path / "cut", kill=True, **options)
    found = run("LoRA", "factory", tmp_path / "cut", tmp_path / "cut" / "checkpoint-5", **options)
    assert found[1:] == expected[1:]


def test_full_fine_tuning_does_not_resume_without_its_reference(tmp_path):
    run("full", "factory", tmp_path, kill=True)
    with pytest.raises(ValueError, match=r"the cache file is not given"):
        run(
            "full",
            "factory",
            tmp_path,
            tmp_path / "checkpoint-5",
            alignment=RESUMED,
        )
    with pytest.raises(ValueError, match=r"saved run kept to a reference with weights"):
        run("full", "factory", tmp_path, tmp_path / "checkpoint-5")


def test_callback_can_join_at_a_resume(tmp_path):
    model = MODELS["LoRA"]()
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = trainer_of(model, args, **options_for("factory", model, args))
    trainer.add_callback(KillAfterSaving())
    with pytest.raises(KilledError):
        trainer.train()
    trainer = trainer_of(model, args, **options_for("factory", model, args, RESUMED))
    SafeGradCallback().add_to(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "safegrad/cosine" in safegrad_logs(trainer)[2]
