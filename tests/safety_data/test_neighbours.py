import pytest
import torch

from safegrad_optim.safety_data import _neighbours
from safegrad_optim.safety_data._neighbours import mean_over_neighbours


def naive(scores, states, count):
    unit = states.double() - states.double().mean(dim=0)
    unit = unit / unit.norm(dim=1, keepdim=True)
    means = []
    for row, similarity in enumerate((unit @ unit.T).tolist()):
        near = sorted(range(len(scores)), key=similarity.__getitem__, reverse=True)
        means.append(scores[[other for other in near if other != row][:count]].double().mean())
    return torch.stack(means)


@pytest.mark.parametrize("total", [2, 5, 40])
@pytest.mark.parametrize("block_bytes", [1, 1 << 28])
def test_score_is_the_mean_of_the_nearest(total, block_bytes, monkeypatch):
    monkeypatch.setattr(_neighbours, "_BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(total)
    scores, states = torch.rand(total, generator=generator), torch.randn(total, 6, generator=generator) + 3
    found = mean_over_neighbours(scores, states.half(), 8)
    torch.testing.assert_close(found.double(), naive(scores, states.half(), 8), rtol=1e-5, atol=1e-6)


def test_one_prompt_keeps_its_score():
    assert mean_over_neighbours(torch.tensor([0.3]), torch.ones(1, 4), 8).tolist() == pytest.approx([0.3])


def test_large_sets_are_compared_with_a_random_bank(monkeypatch):
    monkeypatch.setattr(_neighbours, "BANK", 30)
    # Two clusters far apart: whatever the bank is, neighbours are of one's own.
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0]]).repeat_interleave(100, dim=0)
    states = centres + torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) / 10
    scores = torch.tensor([1.0, 0.0]).repeat_interleave(100)
    assert mean_over_neighbours(scores, states, 8).equal(scores)
