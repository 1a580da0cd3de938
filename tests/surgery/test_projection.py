import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from safegrad_optim import combine, combine_, inner_products, project_conflicting
from safegrad_optim.surgery import _combine, _decision, _pairs, _pieces, _products
from tests.support import oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = [0.0, 1e-6, 1e-3, 1.0, 1e3, 1e9, 1e15]


def random_grads(shapes, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(scale * grad).to(dtype) for grad in grads]


def conflicting(shapes, dtype=torch.float64, scale=1.0, cosine=-0.5):
    """Two gradients of one norm and the given cosine, up to the rounding of the dtype."""
    alignment, noise = random_grads(shapes, seed=1), random_grads(shapes, seed=2)
    a, n = oracle.concatenate(alignment), oracle.concatenate(noise)
    along = float(a @ n / (a @ a)) if a.numel() else 0.0
    across = math.sqrt(1 - cosine**2) * float(a.norm() / ((n - along * a).norm() + 1e-300))
    user = [cosine * a + across * (n - along * a) for a, n in zip(alignment, noise, strict=True)]
    return tuple([(scale * grad).to(dtype) for grad in grads] for grads in (user, alignment))


def assert_matches_oracle(found, user, alignment, rho):
    """Each entry to the rounding of its dtype, at the scale of the largest term of the combination."""
    expected, decided = oracle.surgery(user, alignment, rho)
    # fp32 accumulation of n products errs by some eps32 sqrt(n); the sizes here stay below 1e6.
    for gradient, reference, u, a in zip(found, expected, user, alignment, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is None or gradient.numel() == 0:
            continue
        eps = torch.finfo(gradient.dtype).eps
        accumulation = 1e-5 if gradient.dtype != torch.float64 else 1e-12
        terms = [oracle.widen(t).abs().max().item() for t in (u, a) if t is not None]
        coefficient = rho + (
            abs(decided["inner_product"]) / decided["alignment_norm"] ** 2 if decided["conflict"] else 0
        )
        largest = terms[0] + coefficient * terms[-1]
        error = (oracle.widen(gradient) - reference).abs().max().item()
        assert error <= (eps + accumulation) * largest + torch.finfo(gradient.dtype).tiny


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Gather as on a device, where each kernel costs and more of them is kept."""
    monkeypatch.setattr(_pieces, "_CPU", _pieces._DEVICE)


# --- values ---------------------------------------------------------------------------------------


def test_conflict_by_hand():
    # <u, a> = -1 + 0 = -1, ||a||^2 = 2: u' = u + a / 2, g = u' + 2 a.
    user, alignment = (
        [torch.tensor([-1.0, 3.0]), torch.tensor([0.0])],
        [torch.tensor([1.0, 0.0]), torch.tensor([1.0])],
    )
    projected = project_conflicting(user, alignment)
    assert [gradient.tolist() for gradient in projected] == [[-0.5, 3.0], [0.5]]
    final, stats = combine(user, alignment, rho=2.0)
    assert [gradient.tolist() for gradient in final] == [[1.5, 3.0], [2.5]]
    values = stats.to_dict()
    assert values["inner_product"] == -1.0
    assert values["cosine"] == pytest.approx(-1 / math.sqrt(20))
    assert values["user_norm"] == pytest.approx(math.sqrt(10))
    assert values["alignment_norm"] == pytest.approx(math.sqrt(2))
    assert values["conflict"] == 1.0
    assert values["negligible"] == 0.0
    assert values["final_norm"] == pytest.approx(math.sqrt(1.5**2 + 9 + 2.5**2))


def test_agreement_by_hand():
    user, alignment = [torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 0.0])]
    assert torch.equal(project_conflicting(user, alignment)[0], user[0])
    final, stats = combine(user, alignment, rho=0.5)
    assert final[0].tolist() == [1.5, 3.0]
    assert not stats.conflict


def test_one_inner_product_over_all_parameters():
    # Tensor by tensor the first pair conflicts; together they do not, so nothing is projected.
    user, alignment = [torch.tensor([-1.0]), torch.tensor([5.0])], [torch.tensor([1.0]), torch.tensor([1.0])]
    assert [gradient.item() for gradient in project_conflicting(user, alignment)] == [-1.0, 5.0]


# --- against the oracle ---------------------------------------------------------------------------

shapes = st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=5)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    shapes=shapes,
    dtype=st.sampled_from(DTYPES),
    scales=st.tuples(st.sampled_from(SCALES), st.sampled_from(SCALES)),
    cosine=st.sampled_from([-1.0, -0.5, -0.01, 0.01, 0.5, 1.0]),
    rho=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    missing=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_any_shapes_dtypes_and_scales_match_the_oracle(shapes, dtype, scales, cosine, rho, missing):
    user, alignment = conflicting(shapes, cosine=cosine)
    user = [None if i == missing[0] else (scales[0] * grad).to(dtype) for i, grad in enumerate(user)]
    alignment = [
        None if i == missing[1] else (scales[1] * grad).to(dtype) for i, grad in enumerate(alignment)
    ]
    decided = oracle.surgery(user, alignment, rho)[1]
    limit = torch.finfo(dtype).max / 10
    assume(max(decided["user_norm"], decided["alignment_norm"], decided["final_norm"]) < limit)
    products = inner_products(user, alignment)
    negligible = decided["alignment_norm"] <= products.eps * decided["user_norm"]
    # At the edge of what counts as conflict either decision is right.
    assume(abs(decided["cosine"]) > 1e-6 or decided["cosine"] == 0.0)
    found, stats = combine(user, alignment, rho)
    assert bool(stats.negligible) == negligible
    if negligible:
        decided["conflict"] = False
        return
    assert_matches_oracle(found, user, alignment, rho)
    assert bool(stats.conflict) == decided["conflict"]
    for name in ("inner_product", "user_norm", "alignment_norm", "final_norm"):
        size = decided["user_norm"] * decided["alignment_norm"] if name == "inner_product" else decided[name]
        rounding = torch.finfo(dtype).eps if name == "final_norm" else 0.0
        slack = 1e-5 * size + rounding * (decided["user_norm"] + (1 + rho) * decided["alignment_norm"]) * 10
        if name == "final_norm":
            # Its square is a sum: where the terms cancel, the rounding of the sum is all that is left.
            terms = decided["user_norm"] + (1 + rho) * decided["alignment_norm"]
            slack += 10 * products.eps * terms**2 / max(decided[name], products.eps**0.5 * terms, 1e-300)
        assert float(getattr(stats, name)) == pytest.approx(decided[name], abs=slack + 1e-30)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("other", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("cosine", [-0.9, -1e-3, 1e-3, 0.9])
def test_decision_and_direction_do_not_depend_on_scale(scale, other, cosine):
    user, alignment = conflicting([(40,), (7, 5)], cosine=cosine)
    expected = project_conflicting(user, alignment)
    user, alignment = [scale * grad for grad in user], [scale * other * grad for grad in alignment]
    for found, reference in zip(project_conflicting(user, alignment), expected, strict=True):
        torch.testing.assert_close(found / scale, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_after_surgery_no_conflict_is_left_but_rounding(dtype, rho):
    user, alignment = conflicting([(300, 7), (1000,)], dtype)
    final, _ = combine(user, alignment, rho)
    left = oracle.concatenate(final) @ oracle.concatenate(alignment)
    norms = oracle.concatenate(final).norm() * oracle.concatenate(alignment).norm()
    # n independent roundings of relative size eps add up to eps of the cosine at most.
    assert left / norms >= -torch.finfo(dtype).eps


def test_projecting_twice_changes_nothing():
    user, alignment = conflicting([(64,), (3, 3)])
    once = project_conflicting(user, alignment)
    for twice, reference in zip(project_conflicting(once, alignment), once, strict=True):
        torch.testing.assert_close(twice, reference, rtol=1e-14, atol=1e-14)


def test_small_conflicts_survive_bf16_rounding_and_can_be_measured():
    # Corrections of relative size 1e-3 are below the 2^-9 rounding of bf16.
    user, alignment = conflicting([(200_000,)], torch.bfloat16, cosine=-1e-3)

    def cosine_left(user, alignment):
        final, stats = combine(user, alignment, rho=0.0)
        left = inner_products(final, alignment)
        return float(left.inner_product / (left.user_sq_norm * left.alignment_sq_norm).sqrt()), stats

    left, stats = cosine_left(user, alignment)
    assert float(stats.cosine) < left < -1e-5
    in_fp32, _ = cosine_left([u.float() for u in user], [a.float() for a in alignment])
    assert abs(in_fp32) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "other"])
def test_half_precision_is_rounded_once(dtype, device, request):
    if device == "other":
        request.getfixturevalue("as_on_a_device")
    user, alignment = conflicting([(300, 7), (40_001,), (5, 4, 3)], dtype)
    user[0] = user[0].t().contiguous().t()
    final, stats = combine(user, alignment, 0.3)
    coefficient = 0.3 - float(stats.inner_product) / float(stats.alignment_norm) ** 2
    for found, u, a in zip(final, user, alignment, strict=True):
        exact = u.double() + coefficient * a.double()
        half_an_ulp = torch.finfo(dtype).eps / 2 * (exact.abs() + torch.finfo(dtype).tiny)
        in_fp32 = 1e-6 * (u.double().abs() + coefficient * a.double().abs())
        assert bool(((found.double() - exact).abs() <= half_an_ulp + in_fp32).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_fp32(dtype):
    # 1 + 4095 ulps of 2^-12: a half-precision running sum would stay at 1 or stop at 2048.
    ones = [torch.ones(4096, dtype=dtype)]
    assert float(inner_products(ones, ones).inner_product) == 4096.0
    small = [torch.tensor([1.0] + [2.0**-6] * 4096, dtype=dtype)]
    assert float(inner_products(small, small).user_sq_norm) == 2.0


def test_the_error_of_a_sum_does_not_grow_with_the_length_of_the_tensor():
    # Equal terms are the worst case: all roundings go one way. Carried on in fp32, ten sums would lose
    # ten times what one does.
    def error(elements):
        user = [torch.full((elements,), 0.1)]
        exact = user[0].double().square().sum().item()
        return abs(float(inner_products(user, [None]).user_sq_norm) / exact - 1)

    assert error(10 * _products._SUMMED) <= 1.1 * error(_products._SUMMED) + 1e-6


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_strides_and_zero_dimensions(dtype):
    shapes = [(_pieces._CPU.piece * 2 + 3,), (600, 450), (), (0, 3), (1,), *[(150, 200)] * 20]
    user, alignment = conflicting(shapes, dtype, scale=0.1)
    user[1] = user[1].t().contiguous().t()
    view = torch.zeros(600, 900, dtype=dtype)[:, ::2]
    alignment[1] = view.copy_(alignment[1])
    assert not user[1].is_contiguous()
    assert not alignment[1].is_contiguous()
    kept = [grad.clone() for grad in user]
    final, _ = combine(user, alignment, 1.0)
    assert_matches_oracle(final, user, alignment, 1.0)
    assert all(torch.equal(*pair) for pair in zip(user, kept, strict=True))
    in_place, _ = combine_(user, alignment, 1.0)
    for before, after, reference in zip(user, in_place, final, strict=True):
        assert after is before
        assert torch.equal(after, reference)


def test_complex_gradients_count_as_pairs_of_reals():
    user, alignment = [torch.tensor([1 - 2j, 0.5j])], [torch.tensor([-1 + 1j, 1.0])]
    final, stats = combine(user, alignment, 1.0)
    assert float(stats.inner_product) == -3.0
    assert final[0].is_complex()
    assert_matches_oracle(
        [torch.view_as_real(final[0])], [torch.view_as_real(user[0])], [torch.view_as_real(alignment[0])], 1.0
    )


def test_complex_gradients_may_be_conjugated_lazily():
    user, alignment = torch.tensor([1 - 2j, 0.5j]), torch.tensor([-1 + 1j, 1.0])
    expected = combine([user.conj().resolve_conj()], [alignment], 1.0)[0][0]
    lazy = user.clone().conj()
    (found,), _ = combine_([lazy], [alignment], 1.0)
    assert found is lazy
    assert torch.equal(found, expected)
    mirrored = combine([user], [alignment.conj()], 1.0)[0][0]
    assert torch.equal(mirrored, combine([user], [alignment.conj().resolve_conj()], 1.0)[0][0])


def sparse(indices, values, size=6):
    return torch.sparse_coo_tensor([indices], torch.tensor(values), (size, 2), check_invariants=True)


def test_sparse_gradients_with_other_indices():
    user = [sparse([1, 4, 1], [[1.0, 2.0], [-3.0, 1.0], [1.0, 0.0]]), torch.tensor([1.0])]
    alignment = [sparse([4, 5], [[2.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0])]
    final, stats = combine(user, alignment, 0.5)
    expected, decided = oracle.surgery(user, alignment, 0.5)
    assert final[0].is_sparse
    assert decided["conflict"]
    for gradient, reference in zip(final, expected, strict=True):
        torch.testing.assert_close(oracle.widen(gradient), reference, rtol=1e-6, atol=1e-6)
    assert stats.to_dict()["final_norm"] == pytest.approx(decided["final_norm"], rel=1e-6)


# --- missing and negligible gradients -------------------------------------------------------------


def test_missing_gradients():
    one, two = torch.tensor([1.0]), torch.tensor([-2.0])
    final, stats = combine([None, one, None, two], [None, None, two, one], rho=0.5)
    assert final[0] is None
    assert torch.equal(final[1], one)
    assert final[2].item() == -1.0
    # Projected over the one parameter that has both: -2 + 2 + 0.5.
    assert final[3].item() == 0.5
    assert stats.to_dict()["final_norm"] == pytest.approx(math.sqrt(1 + 1 + 0.25))
    assert project_conflicting([None, one], [two, two])[0] is None


def test_in_place_twin_leaves_alignment_gradients_and_makes_new_ones_for_missing():
    alignment = [torch.tensor([2.0]), torch.tensor([-1.0])]
    final, _ = combine_([None, torch.tensor([1.0])], alignment, 1.0)
    assert final[0] is not alignment[0]
    assert [grad.item() for grad in alignment] == [2.0, -1.0]


@pytest.mark.parametrize("factor", [0.0, 1e-8])
def test_an_alignment_gradient_below_rounding_does_not_steer(factor):
    user = [torch.tensor([3.0, -1.0])]
    final, stats = combine(user, [factor * torch.tensor([-1.0, 0.0])], 1.0)
    assert torch.equal(final[0], user[0])
    assert bool(stats.negligible)
    assert not stats.conflict
    assert not bool(combine(user, [1e-6 * torch.tensor([-1.0, 0.0])], 1.0)[1].negligible)


def test_the_widest_rounding_of_a_list_says_what_is_negligible():
    alone = [torch.tensor([1.0], dtype=torch.float64)]
    assert not combine(alone, [1e-9 * alone[0]], 1.0)[1].negligible
    assert combine([*alone, torch.zeros(1)], [1e-9 * alone[0], torch.zeros(1)], 1.0)[1].negligible


def test_nothing_at_all():
    final, stats = combine([], [], 1.0)
    assert final == []
    assert bool(stats.negligible)
    assert combine([None], [None], 1.0)[0] == [None]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "alignment", "message"),
    [
        ([torch.ones(2)], [], "1 user-task gradients != 0 alignment gradients"),
        (
            [torch.ones(1), torch.ones(64, 8)],
            [torch.ones(1), torch.ones(64, 16)],
            r"Gradient 1: user-task shape \(64, 8\) != alignment shape \(64, 16\)",
        ),
        (
            [torch.ones(2)],
            [torch.ones(2, dtype=torch.float64)],
            "dtype torch.float32 != alignment dtype torch.float64",
        ),
        ([torch.ones(2)], [torch.ones(2, device="meta")], "device cpu != alignment device meta"),
        ([torch.ones(2, dtype=torch.int64)], [None], "torch.int64, expected a floating-point"),
        ([None], [torch.ones(2, dtype=torch.bool)], "torch.bool, expected a floating-point"),
        ([torch.eye(2).to_sparse()], [torch.eye(2)], "Gradient 0: user-task layout torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("function", [inner_products, project_conflicting, combine, combine_])
def test_gradients_that_do_not_fit(function, user, alignment, message):
    with pytest.raises(ValueError, match=message):
        function(user, alignment)


@pytest.mark.parametrize("rho", [-1.0, math.nan, math.inf])
def test_rho_out_of_range(rho):
    user = [torch.ones(1)]
    with pytest.raises(ValueError, match="rho is"):
        combine_(user, [torch.ones(1)], rho)
    assert user[0].item() == 1.0


# --- cost -----------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Count host reads, kernels, and the elements of the largest new tensor."""

    def __init__(self):
        super().__init__()
        self.host_reads = 0
        self.kernels = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        self.kernels += not func.is_view
        inputs = {value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)}
        for value in [result] if isinstance(result, torch.Tensor) else []:
            if value.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_surgery_reads_nothing_back_and_copies_one_piece(dtype):
    user, alignment = conflicting([(4 * _pieces._CPU.piece,)] * 2, dtype)
    with Watch() as watch:
        combine_(user, alignment, 1.0)
    assert watch.host_reads == 0
    assert watch.largest <= (2 * _pieces._CPU.piece if dtype == torch.bfloat16 else 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_share_their_kernels(dtype, as_on_a_device):
    counts = []
    for tensors in (10, 400):
        user, alignment = conflicting([(8, 64)] * tensors, dtype)
        with Watch() as watch:
            combine_(user, alignment, 1.0)
        counts.append(watch.kernels)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_gathered_makes_no_difference(dtype, monkeypatch):
    shapes = [(300, 7), (8, 64), (), (0, 3), (2 * _pieces._CPU.piece + 3,), (70, 300)]
    user, alignment = conflicting(shapes, dtype)
    found = []
    # As on a CPU and on a device; all alone; in pieces so small that none is kept.
    for sizes in (
        _pieces._CPU,
        _pieces._DEVICE,
        _pieces._Sizes(1 << 30, 0, 0),
        _pieces._Sizes(1000, 1 << 30, 0),
    ):
        monkeypatch.setattr(_pieces, "_CPU", sizes)
        found.append(combine(user, alignment, 1.0)[0])
        assert_matches_oracle(found[-1], user, alignment, 1.0)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            # The decision may differ in the last bits of its sums, and so the rounding of an entry.
            torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_gathered_pieces_are_kept_from_the_sums_on_up_to_a_size(monkeypatch):
    user, alignment = conflicting([(8, 64)] * 20, torch.float32)
    gathered = []
    original = _pieces.flattened
    monkeypatch.setattr(_pieces, "flattened", lambda tensors: gathered.append(1) or original(tensors))
    for kept, times in ((20 * 512, 2), (20 * 512 - 1, 4)):
        monkeypatch.setattr(_pieces, "_CPU", _pieces._Sizes(1 << 20, 1 << 20, kept))
        gathered.clear()
        combine(user, alignment, 1.0)
        assert len(gathered) == times


def test_statistics_are_read_at_once():
    stats = combine([torch.ones(3)], [torch.ones(3)], 1.0)[1]
    assert all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in stats)
    assert set(stats.to_dict()) == set(stats._fields)


def test_each_gradient_enters_the_code_for_dtensors_once(monkeypatch):
    entered = []
    original = _pairs.held
    monkeypatch.setattr(_pairs, "held", lambda tensor: entered.append(id(tensor)) or original(tensor))
    user, alignment = conflicting([(4,), (3, 2)])
    combine_([None, *user], [torch.ones(1), *alignment], 1.0)
    assert len(entered) == len(set(entered)) == 1  # the one without a partner; plain pairs need none
    # No other file of the surgery asks what a tensor is on the ranks.
    for module in (_combine, _decision, _pieces, _products):
        assert {"local", "held", "is_distributed_tensor", "placed_as"}.isdisjoint(vars(module))
