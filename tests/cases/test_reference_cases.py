"""Situations in which P_ref might not be the aligned model, as they should go."""

import copy
import json
import warnings

import peft
import pytest
import torch

from safegrad_optim import KLAlignment, Reference, SafeGradOptimizer
from safegrad_optim.forward import unchanged_evaluation
from tests.cases.support import (
    PART_I,
    refused,
    right_or_refused,
    sgd,
    take_steps,
    user_backward,
    user_ids,
)
from tests.support.models import (
    VOCABULARY,
    in_four_bits,
    padded,
    perturb,
    safety_rows,
    tiny_model,
    tiny_peft,
    trainable,
)


def divergence(alignment, index=0):
    """KL(P_ref || P_model) a token of one safety batch."""
    with torch.no_grad():
        return float(sum(alignment._losses([index])))


def protected(model, **options):
    return SafeGradOptimizer(sgd(model), KLAlignment(model, safety_rows(), **options))


# --- is the reference the aligned model? ----------------------------------------------------------


def long_rows(count, response=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 4 + response), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in ids]


def adapter_that_says(token, boost, rows, where):
    """A model whose adapter raises the logit of a token at some positions of the rows, and nowhere else."""
    model = tiny_model(tie_word_embeddings=False, hidden_size=128)
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, 3:-1]
    wanted = torch.zeros(hidden.shape[:2], dtype=hidden.dtype)
    wanted[where] = boost
    model = tiny_peft(model=model, r=1, lora_alpha=1, target_modules=["lm_head"])
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.lora_A["default"].weight.copy_(torch.linalg.pinv(hidden.flatten(0, 1)) @ wanted.flatten())
        head.lora_B["default"].weight.zero_()[token] = 1.0
    return model


def test_an_adapter_that_holds_the_opening_of_a_refusal_is_refused():
    """The model is compared with its reference at the opening token too, not in the mean alone."""
    rows = long_rows(2)
    model = adapter_that_says(7, 5.0, rows, (slice(None), 0))
    with torch.no_grad():
        opening = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits[:, 3]
        with model.disable_adapter():
            reference = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits[:, 3]
    assert (opening.softmax(-1)[:, 7] > 5 * reference.softmax(-1)[:, 7]).all()
    with refused():
        KLAlignment(model, rows)


def test_a_reference_that_differs_in_a_later_batch_only_is_refused():
    """The model is compared with its reference on every safety batch."""
    rows = long_rows(4)
    model = adapter_that_says(7, 8.0, rows, slice(2, 4))
    with refused():
        KLAlignment(model, rows, batch_size=2)


def test_aligned_weights_that_are_loaded_afterwards_are_noticed():
    """A reference that was computed before the aligned weights were there is refused at the first step."""
    aligned = tiny_model(seed=7).state_dict()
    model = tiny_model()
    optimizer = protected(model)
    model.load_state_dict(aligned)
    with refused():
        take_steps(model, optimizer, 1)


def test_the_advice_for_adapters_that_change_the_model_names_the_model_as_it_was():
    """PiSSA moves weights into its adapters: the error says to give the aligned model as ref_model."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    base = tiny_model(tie_word_embeddings=False, dtype=torch.float32)
    aligned = copy.deepcopy(base)
    model = peft.get_peft_model(base, config)
    with right_or_refused(r"(?is)(?=.*pissa)(?=.*ref_model=)"):
        assert divergence(KLAlignment(model, safety_rows())) == pytest.approx(0.0, abs=1e-6)
    # That works.
    alignment = KLAlignment(model, safety_rows(), reference=Reference(ref_model=aligned))
    assert divergence(alignment) == pytest.approx(0.0, abs=1e-6)


def test_a_resumed_run_does_not_take_any_reference():
    """`resumed` allows a model that was fine-tuned, not a reference that is no aligned model."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
    )
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False, dtype=torch.float32), config)
    with right_or_refused():
        alignment = KLAlignment(model, safety_rows(), reference=Reference(resumed=True))
        assert divergence(alignment) == pytest.approx(0.0, abs=1e-6)


def the_same_model():
    model = tiny_model()
    take_steps(model, protected(model))
    return model


def merged_adapters():
    model = tiny_peft()
    take_steps(model, protected(model))
    return tiny_peft(model=model.merge_and_unload())


@pytest.mark.parametrize("trained", [the_same_model, merged_adapters])
def test_what_this_process_has_trained_becomes_no_reference_without_a_word(trained):
    """The second stage of a fine-tuning does not take the result of the first for the aligned model."""
    with refused():
        KLAlignment(trained(), safety_rows())


# --- is it still the same? ------------------------------------------------------------------------


def swap_head(model):
    head = torch.nn.Linear(16, VOCABULARY, bias=False, dtype=torch.float64)
    model.base_model.model.lm_head = head.requires_grad_(False)


def overwrite_head(model):
    torch.nn.init.normal_(model.base_model.model.lm_head.weight)


def resize_head(model):
    model.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)


@pytest.mark.parametrize("change", [swap_head, overwrite_head, resize_head])
def test_a_frozen_head_that_changes_is_noticed(change):
    """Hidden states that were kept need the head they came from."""
    model = tiny_peft()
    optimizer = protected(model)
    take_steps(model, optimizer, 2)
    change(model)
    with refused():
        take_steps(model, optimizer, 2)


def test_base_weights_that_adapters_are_merged_into_are_noticed():
    """A merge by hand (ReLoRA) does not make the fine-tuned model the reference."""
    model = tiny_peft()
    optimizer = protected(model, reference=Reference(cache=None))
    take_steps(model, optimizer, 2)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.base_layer.weight += module.get_delta_weight("default")
                module.lora_B["default"].weight.zero_()
    with refused():
        take_steps(model, optimizer, 2)


def test_a_second_model_that_is_synchronised_is_noticed():
    """A reference model that follows the trained one (TRL's sync_ref_model) is no reference."""
    model = tiny_model()
    second = copy.deepcopy(model).requires_grad_(False)
    optimizer = protected(model, reference=Reference(ref_model=second, cache=None))
    with refused():
        for _ in range(3):
            take_steps(model, optimizer, 1)
            second.load_state_dict(model.state_dict())


# --- is the cache what was written? ---------------------------------------------------------------


def all_zero(raw, header):
    raw[header:] = bytes(len(raw) - header)


def second_batch_zero(raw, header):
    start, end = json.loads(raw[8:header])["000001.0"]["data_offsets"]
    raw[header + start : header + end] = bytes(end - start)


@pytest.mark.parametrize(
    ("damage", "resumed"), [(all_zero, True), (second_batch_zero, True), (second_batch_zero, False)]
)
def test_a_damaged_cache_file_is_refused(damage, resumed, tmp_path):
    """A file whose label is right and whose tensors are not what was written is no reference."""
    path = tmp_path / "reference.safetensors"
    rows = safety_rows(6)
    KLAlignment(tiny_peft(), rows, batch_size=2, reference=Reference(file=path))
    raw = bytearray(path.read_bytes())
    damage(raw, 8 + int.from_bytes(raw[:8], "little"))
    path.write_bytes(raw)
    with refused():
        KLAlignment(tiny_peft(), rows, batch_size=2, reference=Reference(file=path, resumed=resumed))


@pytest.fixture
def four_bit(tmp_path):
    """Makes a tiny model with adapters on nf4 weights."""
    pytest.importorskip("bitsandbytes")
    tiny_model(dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)

    def make():
        model = in_four_bits(tmp_path)
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora)

    return make


@pytest.mark.xfail(strict=True, reason=PART_I, raises=ValueError)
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and transformers, about where 4 bits run
def test_four_bit_weights_that_a_forward_has_repacked_are_the_same_reference(four_bit):
    """A run on 4-bit weights resumes after an evaluation on a CPU."""
    saved = protected(four_bit()).state_dict()
    model = four_bit().eval()
    with torch.no_grad():
        model(input_ids=user_ids())
    resumed = protected(model)
    resumed.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes and transformers, about where 4 bits run
def test_four_bit_weights_can_be_trained_after_passes_of_ours(four_bit):
    """In eval mode they are packed on some CPUs, through which no gradient goes."""
    model = four_bit().train()
    optimizer = protected(model)
    with torch.no_grad(), unchanged_evaluation(model):
        model(input_ids=user_ids())
    assert not any(
        getattr(tensor.quant_state, "packing_format_for_cpu", False)
        for tensor in model.parameters()
        if hasattr(tensor, "quant_state")
    )
    model(input_ids=user_ids(), labels=user_ids()).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()


def test_a_pass_that_puts_other_memory_in_place_of_a_weight_is_refused():
    model = tiny_model()
    inside = model.model.layers[0].mlp.up_proj
    inside.register_forward_hook(lambda *_: setattr(inside.weight, "data", inside.weight.data.clone()))
    with pytest.raises(RuntimeError, match="wrote to 1 parameters"):
        protected(model)


# --- refused though it would work, or with a message that does not help ---------------------------

VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(
        adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft gives them
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens(kind):
    """P_ref of prompts that are trained is the model without them, at the same tokens."""
    base = tiny_model(tie_word_embeddings=False)
    model = peft.get_peft_model(base, VIRTUAL[kind]()).to(torch.float64)
    perturb(model, 0.1)
    rows = safety_rows()
    batch = padded(rows)
    labels = batch.pop("labels")
    mask = labels[:, 1:] != -100

    def log_probs():
        logits = model(**batch).logits[:, -labels.shape[1] :]
        return logits[:, :-1][mask].log_softmax(-1)

    model.eval()
    with torch.no_grad():
        own = log_probs()
        with model.disable_adapter():
            reference = log_probs()
    expected = (reference.exp() * (reference - own)).sum(-1).mean()
    # Even untrained prompts are not the aligned model.
    alignment = KLAlignment(model, rows, reference=Reference(resumed=True))
    gradients = alignment(trainable(model))
    torch.testing.assert_close(alignment.last_loss, expected)
    assert all(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore")  # of torchao, about its own API
def test_weights_of_a_tensor_subclass():
    """LoRA on weights that torchao keeps in int8 is protected as plain LoRA trains."""
    quantization = pytest.importorskip("torchao.quantization")

    def is_quantized(module, name):
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    model = tiny_model(dtype=torch.float32, hidden_size=32, intermediate_size=64, tie_word_embeddings=False)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_quantized)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = protected(model)
    take_steps(model, optimizer)
    assert optimizer.counts.steps == 3


def test_a_head_that_is_thawed_in_the_course_of_a_run():
    """A schedule that thaws the head works, or the error names the kind of cache that allows it."""
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    optimizer = SafeGradOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), KLAlignment(model, safety_rows())
    )
    with right_or_refused(r"Reference\(cache=.logits.\)"):
        for step in range(4):
            model.lm_head.requires_grad_(step >= 2)
            user_backward(model, step)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("frozen", [True, False])
def test_the_reference_of_a_large_safety_set_is_announced(frozen, capfd, caplog):
    """Batch after batch that is run before the first step is not run without a word."""
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(not frozen)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        KLAlignment(model, safety_rows(50), batch_size=1)
    shown = capfd.readouterr()
    assert shown.out or shown.err or caplog.records or warned


def test_a_reference_model_of_another_vocabulary():
    """With one more token in the model all kinds of cache work, or the error of all names the way out."""
    model = tiny_model(tie_word_embeddings=False)
    second = copy.deepcopy(model)
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    outcomes = set()
    for cache in ("exact", "logits", "top_k", None):
        reference = Reference(ref_model=second, cache=cache, top_k=8)
        with right_or_refused("(?i)resize"):
            KLAlignment(model, safety_rows(), reference=reference)
            outcomes.add(cache)
    assert outcomes in (set(), {"exact", "logits", "top_k", None})


def data_parallel(folder):
    return torch.nn.DataParallel(tiny_peft())


def offloaded(folder):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(tiny_model(), execution_device="cpu")


def mixture_of_adapters(folder):
    def base():
        model = tiny_model(tie_word_embeddings=False, dtype=torch.float32)
        model.config.use_cache = False  # X-LoRA wants it so
        return model

    tiny_peft(torch.float32, model=base()).save_pretrained(folder)
    adapters = {"0": str(folder), "1": str(folder)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=2, adapters=adapters)
    return peft.get_peft_model(base(), config)


@pytest.mark.filterwarnings("ignore")  # of X-LoRA, about its own way of loading adapters
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (data_parallel, r"DataParallel.*\.module"),
        (offloaded, "offloaded.*without offloading"),
        (mixture_of_adapters, r"xlora_classifier.*Reference\(ref_model="),
    ],
)
def test_a_model_that_cannot_be_served_is_told_why_and_what_to_do(make, advice, tmp_path):
    """The error names the cause and a way out."""
    with pytest.raises((NotImplementedError, ValueError), match=advice):
        KLAlignment(make(tmp_path), safety_rows())
