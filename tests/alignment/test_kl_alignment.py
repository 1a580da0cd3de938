import contextlib
import copy

import peft
import pytest
import torch

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer, SafetySource
from tests.support.models import padded, perturb, safety_rows, tiny_model, tiny_peft, trainable
from tests.support.oracle import alignment_gradient

# Gemma computes its norms in fp32 whatever the dtype of the model.
TOLERANCE = {"Llama": 1e-9, "Qwen2": 1e-9, "GPT2": 1e-9, "Phi": 1e-9, "Gemma2": 1e-4}


def oracle(ref_model, model, rows, positions="response"):
    """Eq. 6 row by row, without padding, differentiated by autograd."""
    _, gradients = alignment_gradient(ref_model, model, [padded([row]) for row in rows], positions)
    return gradients


def assert_gradients_close(found, expected, rtol=1e-9):
    scale = max(gradient.abs().max().item() for gradient in expected if gradient is not None)
    for left, right in zip(found, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, rtol=rtol, atol=rtol * scale)


def adapters_off_copy(model):
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("cache", ["exact", None])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_peft_gradient_is_that_of_the_oracle(cache, positions):
    model, rows = tiny_peft(), safety_rows()
    alignment = KLAlignment(model, rows, reference=Reference(cache=cache), positions=positions)
    perturb(model)
    expected = oracle(adapters_off_copy(model), model, rows, positions)
    assert_gradients_close(alignment(trainable(model)), expected)


# Of Phi because its head has a bias, of Gemma2 because it caps the logits.
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Gemma2", "GPT2", "Phi"])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_full_fine_tuning_gradient_is_that_of_the_oracle(kind, architecture, tied):
    model, rows = tiny_model(architecture, tie_word_embeddings=tied).eval(), safety_rows()
    ref_model = copy.deepcopy(model)
    alignment = KLAlignment(model, rows, reference=Reference(cache=kind), micro_batch_size=2)
    assert alignment.cache.kind == kind
    perturb(model, 0.1)
    found = alignment(trainable(model))
    assert_gradients_close(found, oracle(ref_model, model, rows), rtol=TOLERANCE[architecture])


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
def test_hidden_states_are_exact_where_the_head_is_frozen(architecture):
    model, rows = tiny_model(architecture).eval(), safety_rows()
    model.get_output_embeddings().requires_grad_(False)
    ref_model = copy.deepcopy(model)
    alignment = KLAlignment(model, rows)
    assert alignment.cache.kind == "hidden"
    perturb(model, 0.1)
    found = alignment(trainable(model))
    assert_gradients_close(found, oracle(ref_model, model, rows), rtol=TOLERANCE[architecture])


@pytest.mark.parametrize("cache", ["exact", None])
def test_second_model_as_reference(cache):
    model, rows = tiny_model(), safety_rows()
    ref_model = copy.deepcopy(model)
    alignment = KLAlignment(model, rows, reference=Reference(ref_model=ref_model, cache=cache))
    perturb(model, 0.1)
    assert_gradients_close(alignment(trainable(model)), oracle(ref_model, model, rows))
    assert all(parameter.grad is None for parameter in ref_model.parameters())


def test_padding_changes_nothing():
    model, rows = tiny_peft(), safety_rows()
    batches = [padded(rows), padded(rows, right=4), padded(rows, left=3)]
    alignments = [KLAlignment(model, batch) for batch in batches]
    perturb(model)
    plain, right, left = [alignment(trainable(model)) for alignment in alignments]
    assert_gradients_close(right, plain)
    # Padding on the left shifts the rotary positions, whose angles transformers computes in fp32.
    assert_gradients_close(left, plain, rtol=1e-4)


@pytest.mark.parametrize("cache", ["exact", None])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_change_nothing(size, cache):
    model, rows = tiny_peft(), safety_rows()
    reference = Reference(cache=cache)
    whole = KLAlignment(model, rows, reference=reference)
    split = KLAlignment(model, rows, reference=reference, micro_batch_size=size)
    perturb(model)
    assert_gradients_close(split(trainable(model)), whole(trainable(model)))
    torch.testing.assert_close(split.last_loss, whole.last_loss)


def test_cached_reference_is_the_live_one_during_training():
    model, rows = tiny_peft(), safety_rows(6)
    options = {"batch_size": 2, "seed": 3}
    live = KLAlignment(model, rows, reference=Reference(cache=None), **options)
    cached = KLAlignment(model, rows, **options)
    optimizer = SafeGradOptimizer(torch.optim.AdamW(trainable(model), lr=0.05), cached)
    for step in range(6):
        ids = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        expected = live(trainable(model))
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(cached.last_loss, live.last_loss, rtol=1e-10, atol=1e-15)
        norm = torch.stack([gradient.norm() for gradient in expected]).norm()
        torch.testing.assert_close(optimizer.stats.alignment_norm, norm, rtol=1e-10, atol=1e-15)
    assert optimizer.counts.negligible == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_exactly_zero_before_full_fine_tuning_with_a_kept_head(dtype):
    model = tiny_model(dtype=dtype)
    alignment = KLAlignment(model, safety_rows(), reference=Reference(cache="hidden"), micro_batch_size=2)
    assert not any(gradient.any() for gradient in alignment(trainable(model)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", ["exact", None])
def test_gradient_is_exactly_zero_before_fine_tuning(dtype, cache):
    for model in (tiny_peft(dtype), tiny_model(dtype=dtype)):
        ref_model = None if model.__class__.__name__.startswith("Peft") else copy.deepcopy(model)
        alignment = KLAlignment(model, safety_rows(), reference=Reference(ref_model=ref_model, cache=cache))
        gradients = alignment(trainable(model))
        assert gradients
        assert not any(gradient.any() for gradient in gradients)


def test_only_response_positions_go_through_the_head():
    model, rows = tiny_peft(), safety_rows()
    alignment = KLAlignment(model, rows, reference=Reference(cache=None))
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    alignment(trainable(model))
    response_tokens = sum(label != -100 for row in rows for label in row["labels"])
    assert seen == [response_tokens, response_tokens]


def test_model_is_left_as_it_was():
    model = tiny_peft(lora_dropout=0.5)
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    model.register_buffer("counter", torch.zeros(1))

    def count_and_draw(*_):
        model.counter.add_(1)
        torch.rand(1)

    model.get_output_embeddings().register_forward_hook(count_and_draw)
    alignment = KLAlignment(model, safety_rows(), reference=Reference(cache=None))
    for parameter in trainable(model):
        parameter.grad = torch.full_like(parameter, 3.0)

    def snapshot():
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [parameter.grad for parameter in model.parameters()],
            model.counter.item(),
        )

    before, random_state = snapshot(), torch.get_rng_state()
    gradients = alignment(trainable(model))
    assert snapshot() == before  # compares the identity of each .grad
    assert all((parameter.grad == 3).all() for parameter in trainable(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    # Switching adapters on makes all of them trainable, the first time when the alignment is built.
    assert not frozen.requires_grad
    # Dropout would have made model and reference differ.
    assert not any(gradient.any() for gradient in gradients)


def test_a_buffer_that_the_forward_replaces_is_put_back():
    model = tiny_peft()
    model.register_buffer("seen", torch.zeros(1))
    model.register_forward_hook(lambda module, args, output: setattr(module, "seen", module.seen + 1))
    alignment = KLAlignment(model, safety_rows())
    before = model.seen
    alignment(trainable(model))
    assert model.seen is before
    assert before.item() == 0.0


def test_a_model_that_calls_its_head_twice_is_refused():
    model = tiny_peft()
    head = model.get_output_embeddings()
    inside = model.get_base_model().forward

    def predict_more(*args, **options):
        head(torch.zeros(*options["input_ids"].shape, head.in_features, dtype=head.weight.dtype))
        return inside(*args, **options)

    model.get_base_model().forward = predict_more
    with pytest.raises(RuntimeError, match=r"from one call of the head, found .* from 2"):
        KLAlignment(model, safety_rows())


def test_hooks_of_the_user_on_the_head_see_the_compared_positions_only():
    model, rows = tiny_peft(), safety_rows()
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1]))
    KLAlignment(model, rows)
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    assert {sum(shape.numel() for shape in seen) % tokens} == {0}
    assert {shape[0] for shape in seen} == {1}


def test_weights_cast_for_the_reference_do_not_reach_the_training_loop():
    model = tiny_model(dtype=torch.float32)
    batch = padded(safety_rows())
    with torch.autocast("cpu", torch.bfloat16):
        KLAlignment(model, safety_rows(), autocast_dtype=torch.bfloat16)
        model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_failing_loss_leaves_the_user_gradient_and_the_order():
    model = tiny_peft()
    alignment = KLAlignment(model, safety_rows())
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: torch.zeros(1, 1, 2))
    with pytest.raises(RuntimeError, match="Expected logits of"):
        alignment(trainable(model))
    handle.remove()
    assert all((parameter.grad == 1).all() for parameter in trainable(model))
    assert alignment.state_dict()["taken"] == 0


@pytest.mark.parametrize("surrounding", [True, False])
@pytest.mark.parametrize("cache", ["exact", None])
def test_autocast_is_the_same_for_reference_and_model(cache, surrounding):
    # Adapters in fp32 under autocast: weights cast for the reference must not lose their gradients.
    model, rows = tiny_peft(torch.float32), safety_rows()
    alignment = KLAlignment(model, rows, reference=Reference(cache=cache), autocast_dtype=torch.bfloat16)
    assert not any(gradient.any() for gradient in alignment(trainable(model)))
    perturb(model)
    with torch.autocast("cpu", torch.float16, enabled=surrounding):
        found = alignment(trainable(model))
    expected = oracle(adapters_off_copy(model), model, rows)
    found, expected = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    assert found.norm().item() == pytest.approx(expected.norm().item(), rel=0.1)


def test_a_kept_head_runs_under_the_autocast_of_the_model():
    model, rows = tiny_model(dtype=torch.float32).eval(), safety_rows()
    options = {"autocast_dtype": torch.bfloat16}
    kept, logits = (
        KLAlignment(model, rows, reference=Reference(cache=kind), **options) for kind in ("hidden", "logits")
    )
    perturb(model, 0.1)
    assert_gradients_close(kept(trainable(model)), logits(trainable(model)), rtol=1e-6)


def test_order_is_seeded_covers_each_epoch_and_resumes():
    model, rows = tiny_peft(), safety_rows(5)

    def make(seed):
        return KLAlignment(model, rows, batch_size=1, seed=seed)

    def losses(alignment, count):
        values = []
        for _ in range(count):
            alignment(trainable(model))
            values.append(alignment.last_loss.item())
        return values

    first, second, other = make(0), make(0), make(1)
    perturb(model)
    run = losses(first, 10)
    assert sorted(run[:5]) == sorted(run[5:])
    assert len(set(run[:5])) == 5
    assert run[:5] != run[5:]
    assert losses(other, 10) != run
    assert losses(second, 3) == run[:3]
    second.load_state_dict(copy.deepcopy(second.state_dict()))
    assert losses(second, 7) == run[3:]
    with pytest.raises(ValueError, match="seed 1, this one 0"):
        first.load_state_dict(other.state_dict())


def test_merged_adapters_are_refused():
    model = tiny_peft()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into 4 layers.*unmerge_adapter"):
        KLAlignment(model, safety_rows())


def test_trained_base_weights_are_refused_from_the_moment_they_train():
    model = tiny_peft()
    alignment = KLAlignment(model, safety_rows(), reference=Reference(cache=None))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"outside the adapters \(first: .*embed_tokens"):
        alignment(trainable(model))
    with pytest.raises(ValueError, match="outside the adapters"):
        KLAlignment(model, safety_rows())


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ({"use_dora": True}, "hidden"),
        ({"use_rslora": True}, "hidden"),
        ({"target_modules": ["lm_head"]}, "logits"),
        ({"modules_to_save": ["lm_head"]}, "logits"),
    ],
)
@pytest.mark.parametrize("cache", ["exact", None])
def test_lora_variants(variant, kind, cache):
    base = tiny_model(tie_word_embeddings=False)
    ref_model = copy.deepcopy(base)
    model, rows = tiny_peft(model=base, **variant), safety_rows()
    alignment = KLAlignment(model, rows, reference=Reference(cache=cache))
    assert cache is None or alignment.cache.kind == kind
    perturb(model, 0.1)
    assert_gradients_close(alignment(trainable(model)), oracle(ref_model, model, rows))


def test_an_adapter_that_holds_the_alignment_is_refused():
    model = tiny_peft(dtype=torch.float32)
    perturb(model)
    with pytest.raises(ValueError, match=r"already differs from its reference by KL = .*merge_and_unload"):
        KLAlignment(model, safety_rows())
    KLAlignment(model, safety_rows(), reference=Reference(resumed=True))


def test_another_model_as_reference_is_refused():
    model = tiny_model()
    other = copy.deepcopy(model)
    perturb(other)
    with pytest.raises(ValueError, match="give the aligned one"):
        KLAlignment(model, safety_rows(), reference=Reference(ref_model=other))


@pytest.mark.parametrize("share_all", [True, False])
def test_a_reference_that_trains_along_is_refused(share_all):
    model = tiny_model()
    other = model if share_all else copy.deepcopy(model)
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"shares \d+ trainable parameters.*deepcopy"):
        KLAlignment(model, safety_rows(), reference=Reference(ref_model=other))


def test_a_reference_may_share_what_is_frozen():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    alignment = KLAlignment(model, safety_rows(), reference=Reference(ref_model=other))
    assert not any(gradient.any() for gradient in alignment(trainable(model)))


def test_full_fine_tuning_needs_a_cache():
    with pytest.raises(ValueError, match="cache=None"):
        KLAlignment(tiny_model(), safety_rows(), reference=Reference(cache=None))


def test_a_head_that_becomes_trainable_is_refused():
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    alignment = KLAlignment(model, safety_rows())
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="became trainable"):
        alignment(trainable(model))


def test_a_model_whose_precision_changed_is_refused():
    for model in (tiny_peft(torch.float32), tiny_model(dtype=torch.float32)):
        alignment = KLAlignment(model, safety_rows())
        model.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"reference was computed with .*float32; .*bfloat16"):
            alignment(trainable(model))


def test_models_it_cannot_serve_are_refused():
    with pytest.raises(TypeError, match=r"Linear has no output head.*causal language model"):
        KLAlignment(torch.nn.Linear(2, 2), safety_rows())
    with pytest.raises(ValueError, match=r"positions is 'first'"):
        KLAlignment(tiny_peft(), safety_rows(), positions="first")
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        KLAlignment(tiny_peft(), safety_rows(), micro_batch_size=0)


def test_a_model_without_trainable_parameters_is_refused():
    model = tiny_peft()
    alignment = KLAlignment(model, safety_rows())
    parameters = trainable(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="depends on a trainable"):
        alignment(parameters)


def test_second_adapter_switched_off_with_the_first():
    model = tiny_peft()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.to(torch.float64)
    rows = safety_rows()
    alignment = KLAlignment(model, rows)
    ref_model = adapters_off_copy(model)
    perturb(model)
    assert_gradients_close(alignment(trainable(model)), oracle(ref_model, model, rows))


def test_inputs_that_are_not_of_rows_are_not_split():
    batch = padded(safety_rows(4))
    batch["position_ids"] = torch.arange(batch["labels"].shape[1])[None]
    KLAlignment(tiny_peft(), [batch])
    with pytest.raises(ValueError, match=r"'position_ids' .* shape \(1, 9\).* 4 rows"):
        KLAlignment(tiny_peft(), [batch], micro_batch_size=2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"cache": False}, r"Reference\(cache=None\)"),
        ({"cache_file": "reference.safetensors"}, r"Reference\(file="),
        ({"cache_kind": "logits"}, r"Reference\(cache=\.\.\.\)"),
        ({"top_k": 8}, r"Reference\(cache='top_k', top_k="),
        ({"resumed": True}, r"Reference\(resumed="),
        ({"chunk_size": 4}, r"kl_divergence\(chunk_size="),
        ({"reference": tiny_model()}, r"reference is a LlamaForCausalLM.*Reference\(ref_model="),
    ],
)
def test_an_argument_of_before_is_refused_with_the_name_of_the_new_one(old, new):
    with pytest.raises(TypeError, match=new):
        KLAlignment(tiny_peft(), safety_rows(), **old)


@pytest.mark.parametrize("cache", ["exact", None])
def test_the_loss_is_the_weighted_sum_of_the_means_of_its_sources(cache):
    model, many, few = tiny_peft(), safety_rows(6), safety_rows(2, seed=1)
    reference = Reference(cache=cache)
    sources = [
        SafetySource(rows=many, batch_size=2),
        SafetySource(rows=few, batch_size=1, positions="all", weight=0.3),
    ]
    made = KLAlignment(model, sources, reference=reference)
    alone = [
        KLAlignment(model, many, reference=reference, batch_size=2),
        KLAlignment(model, few, reference=reference, batch_size=1, positions="all", seed=1),
    ]
    perturb(model)
    for _ in range(3):
        found = made(trainable(model))
        one, other = (alignment(trainable(model)) for alignment in alone)
        expected = [left + 0.3 * right for left, right in zip(one, other, strict=True)]
        # Attention computes its softmax in fp32, which rounds gradients of a weighted loss in another place.
        assert_gradients_close(found, expected, rtol=1e-6)
        torch.testing.assert_close(made.last_loss, alone[0].last_loss + 0.3 * alone[1].last_loss)
    state = made.state_dict()
    assert (state["taken"], state["taken_1"], state["seed_1"]) == (3, 3, 1)
    again = KLAlignment(model, sources, reference=Reference(cache=cache, resumed=True))
    again.load_state_dict(state)
    assert_gradients_close(again(trainable(model)), made(trainable(model)), rtol=0)


@pytest.mark.parametrize("model", [tiny_peft, tiny_model])
@pytest.mark.parametrize("options", [{}, {"reference": Reference(cache="top_k", top_k=8)}])
def test_sources_go_through_the_model_together(model, options):
    """The gradient of one pass is that of a pass for each source, whatever is kept of the reference."""
    model = model(dtype=torch.float64).eval()
    sources = [
        SafetySource(rows=safety_rows(3), batch_size=3, tokens=2),
        SafetySource(rows=safety_rows(4, seed=1), batch_size=2, weight=0.3),
        SafetySource(rows=safety_rows(2, seed=2), batch_size=1, positions="all"),
    ]
    together = KLAlignment(model, sources, **options)
    apart = KLAlignment(model, sources, micro_batch_size=8, **options)
    perturb(model)
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    for _ in range(3):
        shapes.clear()
        found = together(trainable(model))
        ((rows, length),) = shapes
        shapes.clear()
        expected = apart(trainable(model))
        assert (rows, length) == (sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes))
        assert len(shapes) == 3
        assert_gradients_close(found, expected, rtol=1e-9)
        torch.testing.assert_close(together.last_loss, apart.last_loss, rtol=1e-9, atol=0)
    hook.remove()


def test_a_source_of_long_rows_goes_through_the_model_by_itself():
    """Beside a row of 60 tokens those of 8 would be computed as if they had 60."""
    model, generator = tiny_peft(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (2, 60), generator=generator).tolist()
    long = [{"input_ids": row, "labels": [-100] * 58 + row[58:]} for row in ids]
    sources = [
        SafetySource(rows=safety_rows(4, seed=1)),
        SafetySource(rows=long, batch_size=2, weight=0.5),
        SafetySource(rows=safety_rows(3, seed=2)),
    ]
    made, apart = (KLAlignment(model, sources, micro_batch_size=size) for size in (None, 8))
    perturb(model)
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    found = made(trainable(model))
    assert len(shapes) == 2
    assert shapes[0] == (2, 60)
    assert shapes[1][0] == 7
    assert_gradients_close(found, apart(trainable(model)), rtol=1e-6)


def test_sources_whose_fields_are_not_one_entry_a_token_have_a_pass_each():
    def with_mask(rows):
        batch = padded(rows)
        # 4-D, as some collators make it: (rows, heads, length, length).
        length = batch["input_ids"].shape[1]
        causal = torch.ones(length, length).tril().bool().expand(len(rows), 1, -1, -1)
        return [batch | {"attention_mask": causal & batch["attention_mask"].bool()[:, None, None]}]

    model = tiny_peft()
    rows = [safety_rows(3), safety_rows(2, seed=1)]
    made = KLAlignment(model, [SafetySource(rows=with_mask(part)) for part in rows])
    expected = KLAlignment(model, [SafetySource(rows=part) for part in rows])
    perturb(model)
    assert_gradients_close(made(trainable(model)), expected(trainable(model)), rtol=1e-5)


def test_a_source_compares_the_first_tokens_alone():
    model, rows = tiny_peft(), safety_rows(4)
    opening = []
    for row in rows:
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        opening.append({name: value[: start + 2] for name, value in row.items()})
    found = KLAlignment(model, [SafetySource(rows=rows, batch_size=2, tokens=2)])
    expected = KLAlignment(model, opening, batch_size=2)
    whole = KLAlignment(model, rows, batch_size=2)
    perturb(model)
    found, expected, whole = (alignment(trainable(model)) for alignment in (found, expected, whole))
    assert_gradients_close(found, expected, rtol=0)
    assert any((one != other).any() for one, other in zip(found, whole, strict=True))


def test_each_source_keeps_its_reference_in_a_file_of_its_own(tmp_path):
    model, file = tiny_peft(), tmp_path / "reference.safetensors"
    sources = [SafetySource(rows=safety_rows(2)), SafetySource(rows=safety_rows(3, seed=1))]
    KLAlignment(model, sources, reference=Reference(file=file))
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "reference-1.safetensors"}
    KLAlignment(model, sources, reference=Reference(file=file))
    with pytest.raises(ValueError, match=r"reference\.safetensors is the reference of other batches"):
        KLAlignment(model, sources[::-1], reference=Reference(file=file))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda rows: [SafetySource(rows=rows, weight=0.0)], "weight is 0.0"),
        (lambda rows: [SafetySource(rows=rows, weight=float("inf"))], "weight is inf"),
        (lambda rows: [SafetySource(rows=rows, tokens=0)], "tokens is 0"),
        (lambda rows: [SafetySource(rows=rows), rows[0]], "A dict stands among SafetySource"),
        (lambda rows: [SafetySource(rows=[])], "safety batches are empty"),
    ],
)
def test_malformed_sources_are_refused(make, error):
    with pytest.raises((TypeError, ValueError), match=error):
        KLAlignment(tiny_peft(), make(safety_rows()))


def test_options_of_one_source_are_refused_beside_several():
    with pytest.raises(ValueError, match="are those of each SafetySource"):
        KLAlignment(tiny_peft(), [SafetySource(rows=safety_rows())], batch_size=4)


@pytest.mark.parametrize(("scale", "is_refused"), [(0.03, False), (0.25, True)])
def test_how_far_a_model_may_be_from_its_reference_at_the_start(scale, is_refused):
    """Rounding is let pass; a tenth of a nat a token is not."""
    model = tiny_peft()
    perturb(model, scale)
    found = KLAlignment(model, safety_rows(), reference=Reference(resumed=True))
    found(trainable(model))
    assert (0.05 < float(found.last_loss) < 0.5) == is_refused
    with pytest.raises(ValueError, match="already differs") if is_refused else contextlib.nullcontext():
        KLAlignment(model, safety_rows())


def test_parameters_in_no_group_keep_what_gradient_they_have():
    """None; with one, the step is refused, because another optimizer would take it."""
    model = tiny_model()
    alignment = KLAlignment(model, safety_rows())
    first, *others = trainable(model)
    first.grad = torch.ones_like(first)
    grads = alignment([first])
    assert len(grads) == 1
    assert all(parameter.grad is None for parameter in others)
    assert (first.grad == 1).all()
    others[0].grad = torch.ones_like(others[0])
    with pytest.raises(ValueError, match="1 parameters of the model have a gradient and are not of this"):
        alignment([first])


def test_the_scale_of_fp16_losses_is_resumed():
    model = tiny_peft(dtype=torch.float16)
    alignment = KLAlignment(model, safety_rows())
    alignment._fp16_scale = 4.0
    again = KLAlignment(model, safety_rows())
    again.load_state_dict(alignment.state_dict())
    assert again._fp16_scale == 4.0
