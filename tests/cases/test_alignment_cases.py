"""Situations of the alignment pass, as they should go: the model is left alone, and its gradient is right."""

import contextlib
import copy

import pytest
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from safegrad_optim import KLAlignment, SafeGradOptimizer
from tests.cases.support import (
    flat,
    right_or_refused,
    sgd,
    take_steps,
    user_backward,
    user_ids,
)
from tests.support.models import padded, perturb, safety_rows, tiny_model, trainable

# --- eval mode is not only "no dropout" -----------------------------------------------------------


class Mixture(torch.nn.Module):
    """Experts whose fast path for inference runs without gradients, as in remote code of several models."""

    def __init__(self, mlp, width, chosen=2, count=4):
        super().__init__()
        self.gate = torch.nn.Linear(width, count, bias=False)
        self.chosen = chosen
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(count))
        perturb(self.experts, 0.1)

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            weights, which = self.gate(x).softmax(-1).topk(self.chosen, -1)
            shares = [(weights * (which == n)).sum(-1, keepdim=True) for n in range(len(self.experts))]
            return sum(expert(x) * share for expert, share in zip(self.experts, shares, strict=True))


@pytest.mark.parametrize("in_training", [True, False])
def test_layers_without_a_graph_in_eval_mode(in_training):
    """The gradient is the one that autograd gives in training mode, whatever mode the step is taken in."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp, 16).double()
    aligned = copy.deepcopy(model)
    batch = padded(safety_rows())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["labels"][:, 1:] != -100

    def log_probs(model):
        return model(**inputs).logits[:, :-1][mask].log_softmax(-1)

    alignment = KLAlignment(model.train(in_training), batch)
    perturb(model, 0.05)
    found = alignment(trainable(model))
    assert all(module.training == in_training for module in model.modules())
    model.train()
    with torch.no_grad():
        reference = log_probs(aligned.train())
    loss = (reference.exp() * (reference - log_probs(model))).sum(-1).mean()
    expected = torch.autograd.grad(loss, trainable(model))
    torch.testing.assert_close(alignment.last_loss, loss.detach())
    assert all(gradient is not None for gradient in found)
    torch.testing.assert_close(flat(found), flat(expected))


class AlwaysDropping(torch.nn.Module):
    """Dropout in its functional form, without training=self.training."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.nn.functional.dropout(self.inner(x), 0.1)


def test_modules_that_are_random_in_eval_mode():
    """Where nothing has moved, model and reference are one; or the model is refused."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = AlwaysDropping(layer.mlp)
    with right_or_refused():
        alignment = KLAlignment(model, safety_rows())
        for step in range(4):
            torch.manual_seed(step)
            gradients = alignment(trainable(model))
            assert abs(float(alignment.last_loss)) < 1e-12
            assert float(flat(gradients).norm()) < 1e-12


# --- the alignment pass leaves no trace -----------------------------------------------------------


def test_dynamic_rope_is_what_it_is_without_the_alignment():
    """The user's losses are those of a plain run, and where nothing moves KL and its gradient are zero."""

    def run(wrapped):
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        model = tiny_model(max_position_embeddings=16, rope_parameters=rope)
        base = sgd(model, lr=0.0)
        alignment = KLAlignment(model, safety_rows()) if wrapped else None
        optimizer = SafeGradOptimizer(base, alignment) if wrapped else base
        losses = []
        for length in (24, 9, 20, 9):
            losses.append(user_backward(model, length=length))
            optimizer.step()
            optimizer.zero_grad()
            if wrapped:
                assert abs(float(alignment.last_loss)) < 1e-12
                assert float(optimizer.stats.alignment_norm) < 1e-12
        return losses

    with right_or_refused():
        assert run(wrapped=True) == run(wrapped=False)


def test_a_pass_that_is_interrupted_leaves_the_model_in_its_mode():
    """Ctrl-C while modes are being switched leaves dropout on."""
    model = tiny_model()
    alignment = KLAlignment(model, safety_rows())
    model.train()
    interrupted = model.model.layers[1]
    switch = type(interrupted).train

    def interrupt(mode=True):
        interrupted.train = switch.__get__(interrupted)
        raise KeyboardInterrupt

    interrupted.train = interrupt
    with contextlib.suppress(KeyboardInterrupt):
        alignment(trainable(model))
    assert all(module.training for module in model.modules())


class MergesInEvalMode(torch.nn.Module):
    """Adds its adapter to its weight in eval mode and takes it away in training, as loralib's layers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.merged = inner, False
        self.adapter = torch.nn.Parameter(torch.ones_like(inner.weight))

    def train(self, mode=True):
        if mode == self.merged:
            with torch.no_grad():
                self.inner.weight += -self.adapter if mode else self.adapter
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        own = 0 if self.merged else torch.nn.functional.linear(x, self.adapter)
        return self.inner(x) + own


def test_adapters_that_are_merged_in_eval_mode_stay_as_they_are():
    """The pass switches no mode that the model's own train() and eval() act on."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = MergesInEvalMode(layer.mlp.down_proj)
    before = copy.deepcopy(model.state_dict())
    alignment = KLAlignment(model, safety_rows())
    alignment(trainable(model))
    assert not any(getattr(module, "merged", False) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class CountsInAList(torch.nn.Module):
    """Keeps what it has seen in containers, which a shallow copy of its attributes does not hold."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.lengths, self.seen, self.last = inner, [], {}, set()

    def forward(self, x):
        self.lengths.append(x.shape[1])
        self.seen[x.shape[1]] = self.seen.get(x.shape[1], 0) + 1
        self.last.add(x.shape[1])
        self.count = len(self.lengths)
        return self.inner(x)


def test_what_modules_keep_of_their_inputs_is_the_users():
    """Lists, dicts, sets and new attributes are what they are without the pass."""

    def kept(wrapped):
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp = CountsInAList(layer.mlp)
        base = sgd(model)
        take_steps(model, SafeGradOptimizer(base, KLAlignment(model, safety_rows())) if wrapped else base)
        mlp = model.model.layers[1].mlp
        return mlp.lengths, mlp.seen, mlp.last, mlp.count

    assert kept(wrapped=True) == kept(wrapped=False)


# --- what others see of it ------------------------------------------------------------------------


def watch_accumulated(model, seen):
    parameter = model.lm_head.weight
    return parameter.register_post_accumulate_grad_hook(lambda tensor: seen.append(tensor.grad.shape))


def watch_steps(model, seen):
    return register_optimizer_step_post_hook(lambda *_: seen.append("step"))


def watch_starts_of_steps(model, seen):
    return register_optimizer_step_pre_hook(lambda *_: seen.append("step"))


@pytest.mark.parametrize("watch", [watch_accumulated, watch_steps, watch_starts_of_steps])
def test_hooks_of_others_see_the_users_passes_only(watch):
    """A logger of gradients and a hook on all optimizers see what they see without; once a step."""

    def seen(wrapped):
        model = tiny_model()
        base = sgd(model, lr=0.5)
        optimizer = SafeGradOptimizer(base, KLAlignment(model, safety_rows())) if wrapped else base
        found = []
        handle = watch(model, found)
        take_steps(model, optimizer)
        handle.remove()
        return found

    assert seen(wrapped=True) == seen(wrapped=False)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_holds_in_the_alignment_pass():
    """Where the user's pass keeps little for backward, the alignment's keeps little too."""
    model = tiny_model(num_hidden_layers=8, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    ids = user_ids(count=4, length=32)
    batch = {"input_ids": ids, "labels": ids}
    alignment = KLAlignment(model, batch)
    model.train()

    def bytes_kept(run):
        sizes = []

        def pack(tensor):
            sizes.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(sizes)

    users = bytes_kept(lambda: model(**batch, use_cache=False))
    assert bytes_kept(lambda: alignment(trainable(model))) < 2 * users


class WithoutUseCache(transformers.LlamaForCausalLM):
    """Own and remote code that keeps no cache."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False
        )


def test_a_forward_that_knows_no_use_cache():
    """A model is asked for no more than its forward takes."""
    model = WithoutUseCache(tiny_model().config)
    optimizer = SafeGradOptimizer(sgd(model), KLAlignment(model, safety_rows()))
    take_steps(model, optimizer)
    assert optimizer.counts.steps == 3
