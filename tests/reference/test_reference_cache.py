import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from safegrad_optim import KLAlignment, Reference
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
    ("make", "kind"), [(tiny_peft, "exact"), *((tiny_model, kind) for kind in ("logits", "hidden", "top_k"))]
)
def test_a_resumed_run_reads_the_reference_of_the_original(make, kind, micro_batch_size, cache_file):
    rows, kept = safety_rows(), {"file": cache_file, "cache": kind, "top_k": 7}
    options = {"batch_size": 2, "micro_batch_size": micro_batch_size}
    original = make()
    uninterrupted = KLAlignment(original, rows, reference=Reference(**kept), **options)
    perturb(original)
    resumed_model = copy.deepcopy(original)
    resumed = KLAlignment(resumed_model, rows, reference=Reference(**kept, resumed=True), **options)
    for _ in range(3):
        found, expected = resumed(trainable(resumed_model)), uninterrupted(trainable(original))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert any(gradient.any() for gradient in found)


def test_a_second_run_reads_instead_of_computing(cache_file):
    first = KLAlignment(tiny_model(), safety_rows(), reference=Reference(file=cache_file))
    written = cache_file.stat().st_mtime_ns
    second = KLAlignment(tiny_model(), safety_rows(), reference=Reference(file=cache_file))
    assert cache_file.stat().st_mtime_ns == written
    assert second.cache.kind == first.cache.kind
    assert all(torch.equal(*pair) for pair in zip(tensors(second), tensors(first), strict=True))
    assert list(cache_file.parent.iterdir()) == [cache_file]


@pytest.mark.parametrize("given", [True, False])
def test_resumed_full_fine_tuning_without_its_reference_raises(given, cache_file):
    reference = Reference(file=cache_file if given else None, resumed=True)
    with pytest.raises(ValueError, match=r"resumed=True.*cache file is (missing: .*safetensors|not given)"):
        KLAlignment(tiny_model(), safety_rows(), reference=reference)
    assert not cache_file.exists()


def test_a_drifted_model_is_not_taken_for_the_reference(cache_file):
    model = tiny_model()
    KLAlignment(model, safety_rows(), reference=Reference(file=cache_file))
    perturb(model)
    with pytest.raises(ValueError, match="reference of other weights"):
        KLAlignment(model, safety_rows(), reference=Reference(file=cache_file))


def test_another_base_model_is_not_taken_for_the_reference_even_when_resumed(cache_file):
    KLAlignment(tiny_peft(seed=0), safety_rows(), reference=Reference(file=cache_file))
    with pytest.raises(ValueError, match="reference of other weights"):
        KLAlignment(tiny_peft(seed=1), safety_rows(), reference=Reference(file=cache_file, resumed=True))


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
    def build(rows=None, model=None, resumed=False, **options):
        reference = Reference(file=cache_file, resumed=resumed)
        return KLAlignment(model or tiny_model(), rows or safety_rows(), reference=reference, **options)

    build()
    with pytest.raises(ValueError, match=rf"reference of other {what}.*Restore"):
        build(resumed=resumed, **change)


def test_a_foreign_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="no cached reference"):
        KLAlignment(tiny_model(), safety_rows(), reference=Reference(file=path))
    assert path.read_bytes() == content


def test_cache_file_without_cache_is_refused(cache_file):
    with pytest.raises(ValueError, match="cache=None"):
        Reference(cache=None, file=cache_file)


def test_bytes_held():
    model, rows = tiny_peft(torch.float32), safety_rows()
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    assert KLAlignment(model, rows).cache.nbytes == tokens * 16 * 4


# --- kinds ----------------------------------------------------------------------------------------


def test_top_k_of_almost_all_tokens_gives_the_gradient_of_all():
    model, rows = tiny_model(), safety_rows()
    vocabulary = model.config.vocab_size
    exact = KLAlignment(model, rows, reference=Reference(cache="logits"))
    most = Reference(cache="top_k", top_k=vocabulary - 1)
    kept = KLAlignment(model, rows, reference=most, micro_batch_size=2)
    few = KLAlignment(model, rows, reference=Reference(cache="top_k", top_k=2))
    perturb(model, 0.1)
    expected = exact(trainable(model))
    for found, reference in zip(kept(trainable(model)), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)
    few(trainable(model))
    assert 0 < few.last_loss < exact.last_loss


def test_top_k_is_kept_in_the_file_with_its_k(cache_file):
    def build(top_k):
        reference = Reference(file=cache_file, cache="top_k", top_k=top_k)
        return KLAlignment(tiny_model(), safety_rows(), reference=reference)

    first, second = build(top_k=3), build(top_k=3)
    assert [tensor.shape[1] for tensor in second.cache.entries[0]] == [4, 3]
    assert all(torch.equal(*pair) for pair in zip(tensors(second), tensors(first), strict=True))
    with pytest.raises(ValueError, match=r"reference of other precision: found top_k 3.*expected top_k 4"):
        build(top_k=4)


def test_the_smaller_of_what_is_exact_is_kept():
    model, rows = tiny_model(), safety_rows(8)
    row, state = model.config.vocab_size * 8, model.config.hidden_size * 8

    def cache(rows, **options):
        tokens = sum(label != -100 for row in rows for label in row["labels"])
        return tokens, KLAlignment(model, rows, reference=Reference(**options)).cache

    tokens, few = cache(rows[:5])
    assert (few.kind, few.head, few.nbytes) == ("logits", (), tokens * row)
    tokens, many = cache(rows)
    assert (many.kind, many.nbytes) == ("hidden", model.config.vocab_size * state + tokens * state)
    assert many.nbytes < tokens * row
    assert cache(rows, cache="hidden")[1].nbytes == many.nbytes
    assert cache(rows, cache="logits")[1].nbytes == tokens * row


@pytest.mark.parametrize("cache", ["exact", "hidden", "logits", "top_k"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_reference_larger_than_the_free_memory_is_refused_before_it_is_computed(
    cache, frozen, monkeypatch, tmp_path
):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(not frozen)
    reference = Reference(cache=cache, top_k=8)
    size = KLAlignment(model, safety_rows(), reference=reference).cache.nbytes
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr("safegrad_optim.reference._kind._MEMORY", meminfo)
    meminfo.write_text(f"MemTotal: 99999 kB\nMemAvailable: {-(-size // 1024)} kB\n")
    KLAlignment(model, safety_rows(), reference=reference)
    meminfo.write_text(f"MemTotal: 99999 kB\nMemAvailable: {(size - 1) // 1024} kB\n")
    model.register_forward_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(MemoryError, match=r"GiB are free.*fewer.*cache='top_k'.*cache=None"):
        KLAlignment(model, safety_rows(), reference=reference)


def test_where_the_machine_does_not_say_what_is_free_nothing_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("safegrad_optim.reference._kind._MEMORY", tmp_path / "none")
    assert KLAlignment(tiny_model(), safety_rows()).cache.kind == "logits"


def test_the_kept_head_is_not_the_one_that_trains():
    model = tiny_model()
    cache = KLAlignment(model, safety_rows(), reference=Reference(cache="hidden")).cache
    before = model.lm_head.weight.detach().clone()
    perturb(model)
    assert torch.equal(cache.head[0], before)


def test_hidden_states_are_refused_where_they_would_not_be_the_reference():
    hooked, replaced = tiny_model(), tiny_model()
    hooked.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    replaced.lm_head.forward = replaced.lm_head.forward
    for model, ref_model in (
        (tiny_peft(), tiny_model()),
        (tiny_peft(target_modules=["lm_head"]), None),
        (hooked, None),
        (replaced, None),
    ):
        with pytest.raises(ValueError, match=r"head belongs to a second model, or is trained.*'logits'"):
            KLAlignment(model, safety_rows(), reference=Reference(ref_model=ref_model, cache="hidden"))


def test_a_file_of_hidden_states_without_their_head_is_refused(cache_file):
    frozen, trained = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=False)
    frozen.lm_head.requires_grad_(False)
    KLAlignment(frozen, safety_rows(), reference=Reference(file=cache_file))
    with pytest.raises(ValueError, match=r"other precision: found hidden, .*expected hidden and head"):
        KLAlignment(trained, safety_rows(), reference=Reference(file=cache_file, cache="hidden"))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="cache is 'topk', expected one of"):
        Reference(cache="topk")


@pytest.mark.skipif(not MAPS.exists(), reason="lists the files a process has mapped on Linux only")
def test_a_cache_file_is_mapped_and_not_read(cache_file):
    KLAlignment(tiny_model(), safety_rows(), reference=Reference(file=cache_file))
    mapped = KLAlignment(tiny_model(), safety_rows(), reference=Reference(file=cache_file))
    assert str(cache_file.resolve()) in MAPS.read_text()
    assert tensors(mapped)[0].any()


def test_a_save_that_fails_leaves_what_was_there(cache_file, monkeypatch):
    """Complete or not at all: neither half a file nor a partial one beside it."""
    KLAlignment(tiny_peft(), safety_rows(), reference=Reference(file=cache_file))
    before = cache_file.read_bytes()

    def fill_the_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fill_the_disk)
    other = cache_file.with_name("other.safetensors")
    with pytest.raises(OSError, match="No space"):
        KLAlignment(tiny_peft(), safety_rows(), reference=Reference(file=other))
    assert [path.name for path in cache_file.parent.iterdir()] == [cache_file.name]
    assert cache_file.read_bytes() == before
    other.write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read as a cached reference"):
        KLAlignment(tiny_peft(), safety_rows(), reference=Reference(file=other))


def test_a_file_is_read_only_if_its_contents_are_what_was_written(cache_file):
    """Any byte of any tensor, an entry less, a name or a shape: the digest is of all."""
    KLAlignment(tiny_model(), safety_rows(6), batch_size=2, reference=Reference(file=cache_file))
    with safe_open(cache_file, framework="pt") as file:
        metadata = file.metadata()
        # Not left in the mapping of a file that is written anew below.
        whole = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    first, *others = sorted(whole)
    bit = whole[first].clone()
    bit.view(torch.uint8).flatten()[-1] ^= 1
    damaged = [
        whole | {first: bit},
        {key: whole[key] for key in others},
        whole | {first: whole[first].flatten()},
        {key + "x" if key == first else key: value for key, value in whole.items()},
    ]
    for tensors_ in damaged:
        save_file(tensors_, cache_file, metadata=metadata)
        with pytest.raises(ValueError, match="does not hold what was written"):
            KLAlignment(tiny_model(), safety_rows(6), batch_size=2, reference=Reference(file=cache_file))
    save_file(whole, cache_file, metadata=metadata)
    KLAlignment(tiny_model(), safety_rows(6), batch_size=2, reference=Reference(file=cache_file))
