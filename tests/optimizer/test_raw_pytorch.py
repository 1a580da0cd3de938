"""An existing PyTorch loop with one line changed: everything around the optimizer keeps working."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from safegrad_optim import KLAlignment, LossAlignment, SafeGradOptimizer
from tests.support.models import VOCABULARY, perturb, safety_rows, tiny_model, tiny_peft, trainable

ROWS = 8


def batch(step):
    # Rows of one length, so that the mean over a batch is the mean over its micro-batches.
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, VOCABULARY, (ROWS, 8), generator=generator)


def safeguard(model, *, base=torch.optim.AdamW, lr=0.02, alignment=None, rho=1.0, every=1, **options):
    """The one line that is changed."""
    alignment = alignment if alignment is not None else KLAlignment(model, safety_rows(6), batch_size=2)
    parameters = options.pop("parameters", None) or trainable(model)
    own = {name: options.pop(name) for name in ("max_grad_norm",) if name in options}
    return SafeGradOptimizer(
        base(parameters, lr=lr, **options), alignment, rho=rho, refresh_every=every, **own
    )


def train(
    model, optimizer, steps=3, *, start=0, parts=1, autocast=None, scaler=None, forward=None, clip=None
):
    """The user's loop: micro-batches, autocast, loss scaling and clipping as they are usually written."""
    scaler = scaler if scaler is not None else torch.amp.GradScaler("cpu", enabled=False)
    forward = forward if forward is not None else model
    model.train()
    for step in range(start, start + steps):
        for ids in batch(step).chunk(parts):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = forward(input_ids=ids, labels=ids, use_cache=False).loss / parts
            scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trainable(model), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def values(model):
    return [parameter.detach().clone() for parameter in trainable(model)]


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def trained(model=None, steps=3, *, loop=None, **options):
    model = model if model is not None else tiny_peft()
    optimizer = safeguard(model, **options)
    train(model, optimizer, steps, **(loop or {}))
    return values(model), optimizer


# --- accumulation ---------------------------------------------------------------------------------


def test_micro_batches_change_neither_the_update_nor_the_weight_of_the_alignment():
    def moved(parts, rho):
        found, optimizer = trained(base=torch.optim.SGD, lr=0.5, rho=rho, loop={"parts": parts})
        assert optimizer.counts.steps == 3
        return flat(found)

    whole, without = moved(1, rho=2.0), moved(1, rho=0.0)
    assert (whole - without).norm() > 1e-4
    for parts in (2, 8):
        split, split_without = moved(parts, rho=2.0), moved(parts, rho=0.0)
        torch.testing.assert_close(split, whole, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(split - split_without, whole - without, rtol=1e-9, atol=1e-12)


def test_only_the_very_first_step_is_plain_however_seldom_the_gradient_is_refreshed():
    _, optimizer = trained(every=10)
    assert optimizer.counts.negligible == 1
    assert optimizer.alignment.state_dict()["taken"] == 2


# --- precision ------------------------------------------------------------------------------------


def test_bf16_autocast_follows_the_fp32_run():
    start = flat(values(tiny_peft(torch.float32)))
    exact, _ = trained(tiny_peft(torch.float32))
    model = tiny_peft(torch.float32)
    alignment = KLAlignment(model, safety_rows(6), batch_size=2, autocast_dtype=torch.bfloat16)
    found, optimizer = trained(model, alignment=alignment, loop={"autocast": torch.bfloat16})
    assert optimizer.counts.negligible == 1
    assert torch.cosine_similarity(flat(found) - start, flat(exact) - start, dim=0) > 0.95


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [True, False])
def test_fp16_loss_scaling_follows_the_fp32_run(fused, clip):
    start = flat(values(tiny_peft(torch.float32)))
    exact, reference = trained(tiny_peft(torch.float32), fused=fused, loop={"clip": clip})
    model = tiny_peft(torch.float32)
    alignment = KLAlignment(model, safety_rows(6), batch_size=2, autocast_dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loop = {"autocast": torch.float16, "scaler": scaler, "clip": clip}
    found, optimizer = trained(model, alignment=alignment, fused=fused, loop=loop)
    assert scaler.get_scale() == 2.0**10
    assert optimizer.counts == reference.counts
    assert torch.cosine_similarity(flat(found) - start, flat(exact) - start, dim=0) > 0.99
    # The alignment gradient is on the scale of the unscaled user gradient.
    for name in ("user_norm", "alignment_norm"):
        expected = float(getattr(reference.stats, name))
        assert float(getattr(optimizer.stats, name)) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_overflows_is_skipped_whole(fused, clip):
    model = tiny_peft(torch.float32)
    alignment = KLAlignment(model, safety_rows(6), batch_size=2, autocast_dtype=torch.float16)
    optimizer = safeguard(model, alignment=alignment, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loop = {"autocast": torch.float16, "scaler": scaler, "clip": clip}
    train(model, optimizer, 2, **loop)

    def snapshot():
        state = optimizer.state_dict()
        return values(model), {name: copy.deepcopy(state[name]) for name in ("state", "param_groups")}

    before, place, counts = snapshot(), alignment.state_dict(), optimizer.counts
    scaler.update(2.0**40)
    train(model, optimizer, 1, start=2, **loop)
    assert scaler.get_scale() == 2.0**39
    assert_same(snapshot(), before)
    assert alignment.state_dict() == place
    assert optimizer.counts == counts
    scaler.update(2.0**10)
    train(model, optimizer, 1, start=2, **loop)
    assert optimizer.counts.steps == 3


# Loss times: so small that its gradient underflows, as it is, so large that a scaled one overflows.
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("where", ["autocast", "model"])
def test_fp16_keeps_alignment_gradients_of_any_size(size, where):
    model = tiny_peft(torch.float32)
    perturb(model, 0.1)

    def gradient(size, dtype):
        def loss(model, inputs):
            return model(**inputs, use_cache=False).loss.float() * size

        alignment = LossAlignment(model, safety_rows(), loss, autocast_dtype=dtype)
        return flat(alignment(trainable(model)))

    exact = gradient(1.0, None)
    if where == "model":  # adapters in fp32, as peft keeps them
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.half()
    found = gradient(size, torch.float16 if where == "autocast" else None)
    assert found.isfinite().all()
    assert not (found == 0).any()
    assert torch.cosine_similarity(found, exact, dim=0) > 0.999
    assert found.norm().item() == pytest.approx(size * exact.norm().item(), rel=0.02)


# --- how the model runs ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    expected, _ = trained()
    model = tiny_peft()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, optimizer = trained(model)
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert optimizer.counts.unprotected == 0


@pytest.fixture
def small():
    yield tiny_peft(model=tiny_model(num_hidden_layers=1, tie_word_embeddings=False))
    torch.compiler.reset()


def test_a_compiled_model_trains_while_the_alignment_has_the_original(small):
    expected, _ = trained(copy.deepcopy(small))
    compiled = torch.compile(small, backend="eager")
    found, _ = trained(small, loop={"forward": compiled})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# Raised while dynamo traces the hook that keeps the compared positions.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_given_to_the_alignment(small, in_place):
    expected, _ = trained(copy.deepcopy(small))
    compiled = small if in_place else torch.compile(small, backend="eager")
    if in_place:
        small.compile(backend="eager")
    alignment = KLAlignment(compiled, safety_rows(6), batch_size=2)
    found, _ = trained(small, alignment=alignment, loop={"forward": compiled})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


# --- which parameters -----------------------------------------------------------------------------


def test_frozen_parameters_in_the_optimizer_do_not_move():
    model = tiny_model(tie_word_embeddings=False)
    model.model.embed_tokens.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().clone()
    optimizer = safeguard(model, parameters=list(model.parameters()), weight_decay=0.1)
    train(model, optimizer)
    assert_same(model.model.embed_tokens.weight.detach(), before)
    without = tiny_model(tie_word_embeddings=False)
    without.model.embed_tokens.requires_grad_(False)
    assert_same(values(model), trained(without, weight_decay=0.1)[0])


@pytest.mark.parametrize("every", [1, 4])
def test_parameters_frozen_in_mid_training_stop(every):
    model = tiny_peft()
    optimizer = safeguard(model, every=every)
    train(model, optimizer, 2)
    frozen = trainable(model)[0].requires_grad_(False)
    before = frozen.detach().clone()
    train(model, optimizer, 2, start=2)
    assert_same(frozen.detach(), before)
    assert optimizer.counts.steps == 4


def test_groups_have_learning_rates_of_their_own():
    def moved(rate):
        model = tiny_peft()
        start, parameters = values(model), trainable(model)
        groups = [{"params": parameters[:4]}, {"params": parameters[4:], "lr": rate}]
        optimizer = safeguard(model, parameters=groups, base=torch.optim.SGD, lr=0.5)
        train(model, optimizer, 1)
        return [flat(values(model)[part]) - flat(start[part]) for part in (slice(4), slice(4, None))]

    (first, second), (same, tenth) = moved(0.5), moved(0.05)
    assert_same(first, same)
    torch.testing.assert_close(tenth, second / 10, rtol=1e-9, atol=1e-14)


def test_a_group_added_in_mid_training_is_aligned_at_once():
    model = tiny_peft()
    parameters = trainable(model)
    for parameter in parameters[4:]:
        parameter.requires_grad_(False)
    optimizer = safeguard(model, parameters=parameters[:4], every=10)
    train(model, optimizer, 2)
    for parameter in parameters[4:]:
        parameter.requires_grad_(True)
    taken = optimizer.alignment.state_dict()["taken"]
    optimizer.add_param_group({"params": parameters[4:], "lr": 0.01})
    before = values(model)
    train(model, optimizer, 1, start=2)
    assert all((left != right).any() for left, right in zip(values(model), before, strict=True))
    assert optimizer.alignment.state_dict()["taken"] == taken + 1


def test_tied_weights_are_aligned_once():
    tied = tiny_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    optimizer = safeguard(tied, lr=0.005)
    train(tied, optimizer)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert len(optimizer.param_groups[0]["params"]) == len(list(tied.parameters()))
    grads = optimizer.alignment(trainable(tied))
    norm = flat(grads).norm()
    fresh = tiny_model(tie_word_embeddings=True)
    alignment = KLAlignment(fresh, safety_rows(6), batch_size=2)
    alignment.load_state_dict({**optimizer.alignment.state_dict(), "taken": 3})
    fresh.load_state_dict(tied.state_dict())
    assert_same(flat(alignment(trainable(fresh))).norm(), norm)


# --- clipping and closures ------------------------------------------------------------------------


def test_clipping_before_the_step_leaves_the_alignment_gradient_whole():
    _, clipped = trained(loop={"clip": 0.01})
    _, plain = trained()
    assert float(clipped.stats.user_norm) == pytest.approx(0.01, rel=1e-4)
    assert float(plain.stats.user_norm) > 0.1
    assert float(clipped.stats.alignment_norm) > 0.01


def test_clipping_in_the_step_is_of_the_final_gradient():
    def final(max_grad_norm):
        model = tiny_peft()
        optimizer = safeguard(model, max_grad_norm=max_grad_norm, base=torch.optim.SGD, lr=0.5)
        norms = []
        # Seen after the step, when .grad is what the base has used.
        optimizer.register_step_post_hook(
            lambda *_: norms.append(flat(p.grad for p in trainable(model)).norm().item())
        )
        train(model, optimizer)
        return norms

    assert final(0.01) == pytest.approx([0.01] * 3, rel=1e-4)
    assert min(final(None)) > 0.1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_closure_takes_the_same_steps(accumulate):
    expected, _ = trained(loop={"parts": accumulate})
    model = tiny_peft()
    optimizer = safeguard(model)
    model.train()
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            total = 0.0
            for ids in batch(step).chunk(accumulate):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss / accumulate
                loss.backward()
                total += loss.detach()
            return total

        assert optimizer.step(closure) > 0
    assert_same(values(model), expected)


# --- copies and checkpoints -----------------------------------------------------------------------


def reload(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), reload],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("make", [tiny_peft, tiny_model])
def test_copies_of_model_and_optimizer_with_its_alignment_train_on_alike(make, duplicate):
    model = make()
    optimizer = safeguard(model, every=2, lr=0.005)
    train(model, optimizer, 3)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert twin_optimizer.alignment.model is twin
    before = values(twin)
    train(model, optimizer, 3, start=3)
    assert_same(values(twin), before)
    train(twin, twin_optimizer, 3, start=3)
    assert_same(values(twin), values(model))
    assert twin_optimizer.counts == optimizer.counts


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_distributed_checkpoint_of_model_and_optimizer(tmp_path):
    def save(model, optimizer):
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)

    def load(model, optimizer):
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)

    def fresh():
        model = tiny_peft()
        return model, safeguard(model, alignment=KLAlignment(model, safety_rows(6), batch_size=2))

    model, optimizer = fresh()
    train(model, optimizer, 2)
    save(model, optimizer)
    train(model, optimizer, 2, start=2)

    resumed, resumed_optimizer = fresh()
    load(resumed, resumed_optimizer)
    assert resumed_optimizer.counts.steps == 2
    train(resumed, resumed_optimizer, 2, start=2)
    assert_same(values(resumed), values(model))
    assert_same(resumed_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
