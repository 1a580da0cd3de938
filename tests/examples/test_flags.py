"""Rates of the benchmark of flags, on numbers that are known."""

import pytest
import torch

from benchmarks.flags import Scored, rates
from safegrad_optim.safety_data._calibration import auc


def test_auc_counts_pairs_in_order_and_half_of_the_ties():
    assert auc(torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5])) == (1 + 1 + 1 + 0.5) / 4


def test_neighbours_find_what_the_own_mass_does_not():
    # Two clouds of states; of the requests one has the mass of a harmless prompt, and the other way round.
    generator = torch.Generator().manual_seed(0)
    clouds = [torch.randn(50, 8, generator=generator) * 0.1 + shift for shift in (1.0, -1.0)]
    harmless, unsafe = torch.full((50,), 0.1), torch.full((50,), 0.9)
    harmless[0], unsafe[0] = 0.9, 0.1
    found = rates(Scored(harmless, clouds[0]), Scored(unsafe, clouds[1]), 50)
    assert found["AUC"] == found["found at 0.5"] == found["found at 1 % false"] == 1.0
    assert found["false at 0.5"] == 0.0
    assert found["AUC without neighbours"] == pytest.approx((49 * 49 + 49) / 2500)
