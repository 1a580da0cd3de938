"""Several ranks take the steps of one process."""

import functools
import re

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from safegrad_optim import Reference
from tests.support import parallel_runs as runs
from tests.support.ranks import RankError, Ranks

_trained = {}


def _one_process(key, **training):
    if key not in _trained:
        _trained[key] = runs.train(**training)
    return _trained[key]


def distance(found, expected):
    """Largest relative distance of a parameter."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )


def assert_same(found, expected, tolerance=1e-6):
    assert expected["counts"][1] > 0, "the run has no conflict to decide"
    for rank in found:
        assert distance(rank["parameters"], expected["parameters"]) <= tolerance
        assert rank["counts"] == expected["counts"]
        for step, expected_step in zip(rank["stats"], expected["stats"], strict=True):
            assert step["conflict"] == expected_step["conflict"]
            for name in ("cosine", "user_norm", "alignment_norm", "final_norm", "loss"):
                assert step[name] == pytest.approx(expected_step[name], rel=100 * tolerance, abs=tolerance)
        # Not nearly: replicas that differ by a bit drift apart.
        assert all(map(torch.equal, rank["parameters"], found[0]["parameters"]))


def assert_same_as_one_process(found, **training):
    assert_same(found, _one_process(repr(sorted(training.items())), **training))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("wrapped", {}),
        ("inner", {"gradient_as_bucket_view": True}),
        ("before", {"static_graph": True}),
        ("wrapped", {"find_unused_parameters": True, "gradient_as_bucket_view": True}),
    ],
)
def test_ddp(ranks, size, given, options):
    assert_same_as_one_process(ranks(size, runs.train, mode="ddp", given=given, parallel_options=options))


ACCUMULATED = {"micro_batches": 2, "refresh_every": 2, "max_grad_norm": 0.5}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bucket_view", [True, False])
def test_ddp_accumulates_without_reduction(ranks, size, bucket_view):
    options = {"gradient_as_bucket_view": bucket_view}
    found = ranks(size, runs.train, mode="ddp", parallel_options=options, **ACCUMULATED)
    assert_same_as_one_process(found, **ACCUMULATED)


@pytest.mark.parametrize(("mode", "given"), [("ddp", "wrapped"), ("fsdp", "before")])
def test_a_kept_head(ranks, mode, given):
    # Of a model that is sharded already it cannot be kept.
    training = {"alignment_options": {"reference": Reference(cache="hidden")}, "given": given}
    assert_same_as_one_process(ranks(2, runs.train, mode=mode, **training), **training)


FSDP = [{"reshard_after_forward": True}, {"reshard_after_forward": False}, {"own_head": True}]


@pytest.mark.parametrize(("size", "training"), [(2, {}), (2, ACCUMULATED), (4, ACCUMULATED)])
@pytest.mark.parametrize("options", FSDP)
def test_fsdp(ranks, size, options, training):
    found = ranks(size, runs.train, mode="fsdp", parallel_options=options, **training)
    assert_same_as_one_process(found, **training)


@pytest.mark.parametrize("changed", ["evaluated", "summed"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp_as_it_may_be_when_a_step_is_taken(ranks, changed, reshard):
    options = {"parallel_options": {"reshard_after_forward": reshard}, changed: True}
    assert_same_as_one_process(ranks(2, runs.train, mode="fsdp", **options))


def test_fsdp_with_parameters_kept_on_the_cpu(ranks):
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    found = ranks(2, runs.train, mode="fsdp", parallel_options=options, **ACCUMULATED)
    assert_same_as_one_process(found, **ACCUMULATED)


@pytest.mark.parametrize(
    ("dtype", "policy", "tolerance"),
    [
        # Rounding as in fp32, so that nothing but rounding in bf16 is left to tell the two runs apart.
        (torch.float64, MixedPrecisionPolicy(torch.float32, torch.float64), 1e-6),
        (torch.float32, MixedPrecisionPolicy(torch.bfloat16, torch.float32), 2e-2),
        (torch.bfloat16, MixedPrecisionPolicy(None, torch.float32), 2e-2),
    ],
)
def test_fsdp_in_mixed_precision(ranks, dtype, policy, tolerance):
    options = {"mode": "fsdp", "dtype": dtype, "parallel_options": {"mp_policy": policy}, "kind": "peft"}
    (expected,) = ranks(1, runs.train, **options)
    assert_same(ranks(2, runs.train, **options), expected, tolerance)


@pytest.mark.parametrize("training", [{}, ACCUMULATED])
def test_hsdp(ranks, training):
    assert_same_as_one_process(ranks(4, runs.train, mode="hsdp", **training), **training)


@pytest.mark.parametrize("size", [2])
@pytest.mark.parametrize("training", [{}, ACCUMULATED])
def test_tensor_parallel(ranks, size, training):
    assert_same_as_one_process(ranks(size, runs.train, mode="tp", **training), **training)


def test_tensor_parallel_with_sharded_logits(ranks):
    options = {"local_logits": False}
    assert_same_as_one_process(ranks(2, runs.train, mode="tp", parallel_options=options))


@pytest.mark.parametrize("training", [{}, ACCUMULATED])
def test_fsdp_and_tensor_parallel(ranks, training):
    assert_same_as_one_process(ranks(4, runs.train, mode="fsdp_tp", **training), **training)


@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw", "max_grad_norm": 0.05},
        {"alignment_options": {"reference": Reference(cache=None), "micro_batch_size": 2}},
    ],
)
def test_adapters(ranks, size, mode, training):
    # The rank of the adapters is 2, so that two of four ranks have nothing of some.
    assert_same_as_one_process(
        ranks(size, runs.train, mode=mode, kind="peft", **training), kind="peft", **training
    )


@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp")])
@pytest.mark.parametrize("alignment", [{}, {"micro_batch_size": 2}])
def test_several_sources(ranks, size, mode, alignment):
    training = {"sources": 3, "kind": "peft", "alignment_options": alignment}
    assert_same_as_one_process(ranks(size, runs.train, mode=mode, **training), **training)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tp"])
def test_cross_entropy_alignment(ranks, mode):
    assert_same_as_one_process(ranks(2, runs.train, mode=mode, align="loss"), align="loss")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_ranks_without_a_safety_row(ranks, mode):
    assert_same_as_one_process(ranks(4, runs.train, mode=mode, rows=2), rows=2)


def test_without_the_reduction_replicas_drift_apart(ranks):
    left, right = ranks(2, runs.train_without_reduction, noticed=False, mode="ddp")
    assert distance(left["parameters"], right["parameters"]) > 1e-4
    with pytest.raises(AssertionError):
        assert_same_as_one_process([left, right])
    with pytest.raises(RankError, match="different alignment gradients"):
        ranks(2, runs.train_without_reduction, noticed=True, mode="ddp")


@pytest.mark.parametrize(
    ("options", "micro_batches", "head_unused"),
    [
        ({}, 2, False),
        ({"gradient_as_bucket_view": True}, 2, False),
        ({"find_unused_parameters": True}, 2, True),
        # torch itself fails where the first pass of a static graph is under no_sync.
        ({"static_graph": True}, 1, False),
    ],
)
def test_the_users_gradients_under_ddp_are_left_alone(ranks, options, micro_batches, head_unused):
    options = {"micro_batches": micro_batches, "head_unused": head_unused, "parallel_options": options}
    found = ranks(2, runs.stays_as_it_was, **options)
    assert found == [0.0, 0.0]


# --- what is communicated ---------------------------------------------------------------------------


def test_ddp_adds_one_average_of_the_alignment_gradient(ranks):
    for found in ranks(2, runs.collectives, mode="ddp"):
        loss_and_presence = 1 + len(found["sizes"])
        sizes = [loss_and_presence, sum(found["sizes"])]
        assert found["refreshed"] == [("allreduce_", 4 * size) for size in sizes]
        assert found["reused"] == []


SUMS = [("allreduce_", 4 * 8)]
LOSS = [("allreduce_", 4)]


@pytest.mark.parametrize(("size", "mode"), [(2, "fsdp"), (4, "hsdp")])
def test_fsdp_adds_one_small_all_reduce_to_what_a_backward_pass_takes(ranks, size, mode):
    for found in ranks(size, runs.collectives, mode=mode):
        assert found["reused"] == SUMS
        assert found["refreshed"] == found["user"] + LOSS + SUMS


def test_tensor_parallelism_adds_one_small_all_reduce_to_what_a_backward_pass_takes(ranks):
    # What the layout of the final norm leaves to be summed, in the gradient of its 16 weights.
    pending = [("all_reduce", 16 * 4)]
    for found in ranks(2, runs.collectives, mode="tp"):
        assert found["reused"] == pending + SUMS
        names = [name for name, _ in found["user"] + pending + pending + SUMS]
        assert sorted(name for name, _ in found["refreshed"]) == sorted(names)


# --- sharded weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "hsdp"), (2, "tp"), (4, "fsdp_tp")])
def test_fingerprint_of_sharded_weights_is_that_of_the_whole(ranks, size, mode):
    expected = runs.fingerprint_of(None)
    assert ranks(size, runs.fingerprint_of, mode=mode) == [expected] * size


# Seven prompts in batches of two or three: ranks with fewer batches than others, and with as many.
@pytest.mark.parametrize("batch_size", [2, 3])
@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp"), (2, "tp")])
def test_scores_of_training_prompts_are_those_of_one_process(ranks, size, mode, batch_size):
    expected = runs.refused_scores(None, batch_size)
    for found in ranks(size, runs.refused_scores, mode=mode, batch_size=batch_size):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp"), (2, "tp")])
def test_openings_of_replies_are_those_of_one_process(ranks, size, mode):
    assert ranks(size, runs.openings_of_replies, mode=mode) == [runs.openings_of_replies(None)] * size


@pytest.mark.parametrize(("size", "mode"), [(2, "ddp"), (2, "fsdp"), (4, "fsdp"), (2, "tp")])
def test_a_check_finds_what_it_does_in_one_process(ranks, size, mode):
    expected = runs.checked(None)
    assert len({str(found) for found in expected}) > 2
    assert ranks(size, runs.checked, mode=mode) == [expected] * size


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_fsdp_settings_are_as_they_were(ranks, kind):
    assert ranks(2, runs.settings_after_step, kind=kind) == [(True, False, False, False)] * 2


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_sharded_checkpoint_goes_on_to_the_bit_and_on_any_number_of_ranks(ranks, kind, tmp_path):
    run = functools.partial(runs.checkpointed, folder=str(tmp_path), kind=kind)
    ranks(2, run, start=0, steps=2, mode="fsdp")
    (expected, counts), _ = ranks(2, run, start=0, steps=5, mode="fsdp")
    assert counts[1] > 0
    for size, mode in [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (1, "fsdp")]:
        for found, found_counts in ranks(size, run, start=2, steps=3, mode=mode):
            assert found_counts == counts
            assert distance(found, expected) <= (0.0 if (size, mode) == (2, "fsdp") else 1e-6)


def test_a_step_at_learning_rate_zero_is_protected_on_all_ranks(ranks):
    assert ranks(2, runs.warm_up_from_zero_with_nothing_on_a_rank) == [1, 1]


def test_ranks_scale_fp16_alike(ranks):
    left, right = ranks(2, runs.fp16_scale_after_overflow)
    assert left == right < 2.0**40


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (runs.alignment_is_not_finite_on_a_rank, {"mode": "ddp"}, "alignment gradient is not finite"),
        (runs.alignment_is_not_finite_on_a_rank, {"mode": "fsdp"}, "alignment gradient is not finite"),
        (runs.user_gradient_is_not_finite_on_a_rank, {"mode": "fsdp"}, "user gradient is not finite"),
        (runs.user_gradient_is_not_finite_on_a_rank, {"mode": "tp"}, "user gradient is not finite"),
        (runs.user_gradient_is_not_reduced, {"mode": "fsdp"}, "not reduced yet"),
        (
            runs.user_gradient_is_not_reduced,
            {"mode": "fsdp", "parallel_options": {"mp_policy": MixedPrecisionPolicy(None, torch.float64)}},
            "not reduced yet",
        ),
        (runs.user_gradient_is_not_reduced, {"mode": "hsdp", "scattered_only": True}, "not reduced yet"),
        (runs.user_gradient_is_not_reduced, {"mode": "ddp"}, "different user gradients"),
        (runs.alignment_gradients_of_their_own, {}, "different alignment gradients"),
        (runs.other_rows_on_a_rank, {}, "Ranks were given different safety batches"),
        (runs.other_rho_on_a_rank, {}, "Ranks were given different rho: rank 0 has 1.0, rank 1 2.0"),
        (runs.tensor_parallel_after_the_alignment, {}, "Build it after"),
        (runs.head_written_before_sharding, {}, "The output head changed since KLAlignment was built"),
        (runs.fsdp1, {}, r"FSDP1.*fully_shard"),
        (runs.deepspeed_zero3, {}, r"ZeRO-3.*fully_shard"),
        (runs.deepspeed_zero2, {}, r"All 1 alignment gradients are None.*ZeRO"),
        (runs.ddp_of_a_part_of_the_ranks, {}, "process group of 1 of 2 ranks"),
        (runs.with_cache_file, {}, "file is given and there are 2 ranks"),
    ],
)
def test_all_ranks_raise_the_same(ranks, function, arguments, message):
    with pytest.raises(RankError) as raised:
        ranks(2, function, **arguments)
    for error in raised.value.args:
        assert re.search(f"(?s){message}", error), error


def test_where_a_rank_dies_the_others_end_with_an_error():
    group = Ranks(2)
    try:
        with pytest.raises(RankError, match=r"Connection|timed out") as raised:
            group(runs.dies_before_the_step, dying=1)
    finally:
        group.stop()
    assert raised.value.args[1] == "died"
