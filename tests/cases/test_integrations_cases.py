"""Situations of other frameworks, as they should go."""

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState

from safegrad_optim import KLAlignment, SafeGradOptimizer
from safegrad_optim.integrations.transformers import SafeGradCallback, protect_trainer, safegrad_optimizer
from tests.cases.support import refused, right_or_refused
from tests.support.models import padded, safety_rows, tiny_model, tiny_peft


@pytest.fixture(autouse=True)
def fresh_state():
    # accelerate keeps its settings for the whole process.
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def arguments(folder, **options):
    defaults = {"max_grad_norm": 0, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return transformers.TrainingArguments(str(folder), **defaults | options)


def trainer_with(optimizer, model, folder, steps):
    return transformers.Trainer(
        model,
        arguments(folder, max_steps=steps, save_strategy="no"),
        train_dataset=safety_rows(6, seed=5),
        data_collator=padded,
        optimizers=(optimizer, None),
    )


def test_a_base_that_accelerate_has_prepared():
    """Surgery happens once a step and not once a micro-batch, or such a base is refused."""
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    weight = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(weight.weight)
    model, base = accelerator.prepare(weight, torch.optim.SGD(weight.parameters(), 1.0))
    with right_or_refused():
        optimizer = SafeGradOptimizer(base, lambda parameters: [torch.ones_like(parameters[0])], rho=1.0)
        for _ in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.ones(1, 1)).sum())
                optimizer.step()
                optimizer.zero_grad()
        assert weight.weight.item() == -(1.0 + optimizer.rho)
        assert optimizer.counts.steps == 1


def test_an_optimizer_over_other_parameters_than_the_trainers_model(tmp_path):
    """The callback refuses an optimizer that does not train what the Trainer trains."""
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = SafeGradOptimizer(base, KLAlignment(model, safety_rows()))
    # Freezes the parameters above.
    with_adapters = tiny_peft(torch.float32, model=model)
    trainer = trainer_with(optimizer, with_adapters, tmp_path, 2)
    SafeGradCallback().add_to(trainer)
    with refused():
        trainer.train()


class NoDecayOfEmbeddings(transformers.Trainer):
    """A Trainer that chooses for itself which parameters are decayed."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "embed" not in name]


class OwnOptimizer(NoDecayOfEmbeddings):
    """A Trainer that chooses its optimizer as well."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.RMSprop, {"lr": 0.5}


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, NoDecayOfEmbeddings, OwnOptimizer])
def test_optimizer_and_groups_are_those_of_the_trainer_that_trains(tmp_path, trainer_class):
    """A subclass of Trainer has its own parameter groups and optimizer with protect_trainer, too."""
    args = arguments(tmp_path, weight_decay=0.1)

    def created(protected):
        model = tiny_model(dtype=torch.float32)
        trainer = trainer_class(model, args, train_dataset=safety_rows())
        if protected:
            protect_trainer(trainer, safety_rows())
        optimizer = trainer.create_optimizer()
        assert trainer.optimizer is optimizer
        base = optimizer.base_optimizer if protected else optimizer
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [
            {**group, "params": [names[part] for part in group["params"]]} for group in base.param_groups
        ]
        return type(base), groups

    assert created(protected=True) == created(protected=False)


def test_an_optimizer_that_the_trainer_was_given_is_wrapped(tmp_path):
    """protect_trainer takes whatever the Trainer steps with."""
    model = tiny_model(dtype=torch.float32)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_with(base, model, tmp_path, 3)
    protect_trainer(trainer, safety_rows())
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.base_optimizer is base
    assert (optimizer.counts.steps, optimizer.counts.unprotected) == (3, 0)


def test_a_trainer_that_is_protected_already_is_told(tmp_path):
    """A factory of the other way in would be wrapped a second time."""
    args = arguments(tmp_path)
    chosen = safegrad_optimizer(args, safety_rows())
    trainer = transformers.Trainer(tiny_model(), args, optimizer_cls_and_kwargs=chosen)
    with pytest.raises(TypeError, match="safegrad_optimizer"):
        protect_trainer(trainer, safety_rows())


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    "alignment", [None, lambda parameters: [torch.full_like(p, 1e-3) for p in parameters]]
)
def test_what_is_set_on_the_optimizer_that_fabric_returns(alignment):
    """Gradients and options that are given to Fabric's stand-in reach the optimizer itself."""
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    network, optimizer = fabric.setup(model, SafeGradOptimizer(base, alignment, rho=0.0))
    fabric.backward(network(torch.ones(1, 3)).sum())
    optimizer.set_alignment_grad([-torch.ones_like(parameter) for parameter in model.parameters()])
    optimizer.step()
    assert float(optimizer.stats.inner_product) == -8.0
    assert optimizer.counts == (1, 1, 0, 0)
    optimizer.rho = 5.0
    assert optimizer.optimizer.rho == 5.0
