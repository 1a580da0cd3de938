import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safegrad_optim import KLAlignment
from tests.support.models import perturb, safety_rows, tiny_model, tiny_peft, trainable

MAPS = Path("/proc/self/maps")


@pytest.fixture
def cache_file(tmp_path):
    return tmp_path / "deep" / "reference.safetensors"


def tensors(alignment):
    return [tensor for entry in alignment.cache.entries for tensor in entry]


# In micro-batches the cached rows are cut, so that they begin anywhere in memory.
@pytest.mark.parametrize("micro_batch_size", [None, 1])
@pytest.mark.parametrize(
    ("make", "kind"), [(tiny_peft, None), *((tiny_model, kind) for kind in ("logits", "hidden", "top_k"))]
)
def test_a_resumed_run_reads_the_reference_of_the_original(make, kind, micro_batch_size, cache_file):
    rows, options = safety_rows(), {"cache_file": cache_file, "cache_kind": kind, "batch_size": 2}
    options |= {"micro_batch_size": micro_batch_size, "top_k": 7}
    original = make()
    uninterrupted = KLAlignment(original, rows, **options)
    perturb(original)
    resumed_model = copy.deepcopy(original)
    resumed = KLAlignment(resumed_model, rows, resumed=True, **options)
    for _ in range(3):
        found, expected = resumed(trainable(resumed_model)), uninterrupted(trainable(original))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert any(gradient.any() for gradient in found)


def test_a_second_run_reads_instead_of_computing(cache_file):
    first = KLAlignment(tiny_model(), safety_rows(), cache_file=cache_file)
    written = cache_file.stat().st_mtime_ns
    second = KLAlignment(tiny_model(), safety_rows(), cache_file=cache_file)
    assert cache_file.stat().st_mtime_ns == written
    assert second.cache.kind == first.cache.kind
    assert all(torch.equal(*pair) for pair in zip(tensors(second), tensors(first), strict=True))
    assert list(cache_file.parent.iterdir()) == [cache_file]


@pytest.mark.parametrize("given", [True, False])
def test_resumed_full_fine_tuning_without_its_reference_raises(given, cache_file):
    with pytest.raises(ValueError, match=r"resumed=True.*cache file is (missing: .*safetensors|not given)"):
        KLAlignment(tiny_model(), safety_rows(), resumed=True, cache_file=cache_file if given else None)
    assert not cache_file.exists()


def test_a_drifted_model_is_not_taken_for_the_reference(cache_file):
    model = tiny_model()
    KLAlignment(model, safety_rows(), cache_file=cache_file)
    perturb(model)
    with pytest.raises(ValueError, match="reference of other weights"):
        KLAlignment(model, safety_rows(), cache_file=cache_file)


def test_another_base_model_is_not_taken_for_the_reference_even_when_resumed(cache_file):
    KLAlignment(tiny_peft(seed=0), safety_rows(), cache_file=cache_file)
    with pytest.raises(ValueError, match="reference of other weights"):
        KLAlignment(tiny_peft(seed=1), safety_rows(), cache_file=cache_file, resumed=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rows": safety_rows(seed=1)}, "batches"),
        ({"batch_size": 2}, "batches"),
        ({"positions": "all"}, "batches"),
        ({"autocast_dtype": torch.bfloat16}, "precision"),
        ({"model": tiny_model(num_hidden_layers=1)}, "architecture"),
        ({"model": tiny_model(dtype=torch.float32)}, "architecture"),
    ],
)
@pytest.mark.parametrize("resumed", [True, False])
def test_a_file_of_something_else_is_refused(change, what, resumed, cache_file):
    def build(rows=None, model=None, **options):
        return KLAlignment(model or tiny_model(), rows or safety_rows(), cache_file=cache_file, **options)

    build()
    with pytest.raises(ValueError, match=rf"reference of other {what}.*(Restore|cache_file)"):
        build(resumed=resumed, **change)


def test_a_foreign_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="no cached reference"):
        KLAlignment(tiny_model(), safety_rows(), cache_file=path)
    assert path.read_bytes() == content


def test_cache_file_without_cache_is_refused(cache_file):
    with pytest.raises(ValueError, match="cache=False"):
        KLAlignment(tiny_peft(), safety_rows(), cache=False, cache_file=cache_file)


def test_bytes_held():
    model, rows = tiny_peft(torch.float32), safety_rows()
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    assert KLAlignment(model, rows).cache.nbytes == tokens * 16 * 4


# --- kinds ----------------------------------------------------------------------------------------


def test_top_k_of_almost_all_tokens_gives_the_gradient_of_all():
    model, rows = tiny_model(), safety_rows()
    vocabulary = model.config.vocab_size
    exact = KLAlignment(model, rows, cache_kind="logits")
    kept = KLAlignment(model, rows, cache_kind="top_k", top_k=vocabulary - 1, micro_batch_size=2)
    few = KLAlignment(model, rows, cache_kind="top_k", top_k=2)
    perturb(model, 0.1)
    expected = exact(trainable(model))
    for found, reference in zip(kept(trainable(model)), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
    few(trainable(model))
    assert 0 < few.last_loss < exact.last_loss


def test_top_k_is_kept_in_the_file_with_its_k(cache_file):
    def build(**options):
        return KLAlignment(tiny_model(), safety_rows(), cache_file=cache_file, cache_kind="top_k", **options)

    first, second = build(top_k=3), build(top_k=3)
    assert [tensor.shape[1] for tensor in second.cache.entries[0]] == [4, 3]
    assert all(torch.equal(*pair) for pair in zip(tensors(second), tensors(first), strict=True))
    with pytest.raises(ValueError, match=r"reference of other precision: found top_k 3.*expected top_k 4"):
        build(top_k=4)


def test_the_smaller_of_what_is_exact_is_kept_and_beyond_the_limit_top_k_with_a_warning(monkeypatch):
    model, rows = tiny_model(), safety_rows(8)
    row, state = model.config.vocab_size * 8, model.config.hidden_size * 8

    def cache(rows, **options):
        tokens = sum(label != -100 for row in rows for label in row["labels"])
        return tokens, KLAlignment(model, rows, **options).cache

    tokens, few = cache(rows[:5])
    assert (few.kind, few.head, few.nbytes) == ("logits", (), tokens * row)
    tokens, many = cache(rows)
    assert (many.kind, many.nbytes) == ("hidden", model.config.vocab_size * state + tokens * state)
    assert many.nbytes < tokens * row
    monkeypatch.setattr("safegrad_optim.reference._kind._MAX_EXACT_BYTES", many.nbytes)
    assert cache(rows)[1].kind == "hidden"
    monkeypatch.setattr("safegrad_optim.reference._kind._MAX_EXACT_BYTES", many.nbytes - 1)
    with pytest.warns(UserWarning, match=r"5 log-probabilities a token are cached.*Give cache_kind='hidden'"):
        assert cache(rows, top_k=5)[1].kind == "top_k"
    assert cache(rows, cache_kind="hidden")[1].nbytes == many.nbytes
    assert cache(rows, cache_kind="logits")[1].nbytes == tokens * row


def test_the_kept_head_is_not_the_one_that_trains():
    model = tiny_model()
    cache = KLAlignment(model, safety_rows(), cache_kind="hidden").cache
    before = model.lm_head.weight.detach().clone()
    perturb(model)
    assert torch.equal(cache.head[0], before)


def test_hidden_states_are_refused_where_they_would_not_be_the_reference():
    hooked, replaced = tiny_model(), tiny_model()
    hooked.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    replaced.lm_head.forward = replaced.lm_head.forward
    for model, reference in (
        (tiny_peft(), tiny_model()),
        (tiny_peft(target_modules=["lm_head"]), None),
        (hooked, None),
        (replaced, None),
    ):
        with pytest.raises(ValueError, match=r"head belongs to a second model, or is trained.*'logits'"):
            KLAlignment(model, safety_rows(), reference=reference, cache_kind="hidden")


def test_a_file_of_hidden_states_without_their_head_is_refused(cache_file):
    frozen, trained = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=False)
    frozen.lm_head.requires_grad_(False)
    KLAlignment(frozen, safety_rows(), cache_file=cache_file)
    with pytest.raises(ValueError, match=r"other precision: found hidden, .*expected hidden and head"):
        KLAlignment(trained, safety_rows(), cache_file=cache_file, cache_kind="hidden")


def test_an_unknown_kind_and_a_kind_without_cache_are_refused():
    with pytest.raises(ValueError, match="cache_kind is 'topk', expected one of"):
        KLAlignment(tiny_model(), safety_rows(), cache_kind="topk")
    with pytest.raises(ValueError, match="cache_kind is given but cache=False"):
        KLAlignment(tiny_peft(), safety_rows(), cache=False, cache_kind="top_k")


@pytest.mark.skipif(not MAPS.exists(), reason="lists the files a process has mapped on Linux only")
def test_a_cache_file_is_mapped_and_not_read(cache_file):
    KLAlignment(tiny_model(), safety_rows(), cache_file=cache_file)
    mapped = KLAlignment(tiny_model(), safety_rows(), cache_file=cache_file)
    assert str(cache_file.resolve()) in MAPS.read_text()
    assert tensors(mapped)[0].any()
