"""The Hugging Face Trainer and accelerate on two ranks take the steps of one process."""

import pytest
import torch

from tests.parallel.test_distributed import distance
from tests.support import parallel_accelerate, parallel_trainer
from tests.support.ranks import RankError

# Kernels of torch 2.8 round fp32 otherwise in batches of another size; in fp64 the distance is 6e-16.
BOUND = 1e-6 if torch.__version__ >= "2.13" else 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    """The process to compare with sums in the order of the ranks, which have a thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("mode", "kind", "path"),
    [
        ("ddp", "LoRA", "optimizers"),
        ("ddp", "LoRA", "factory"),
        ("ddp", "full", "optimizers"),
        ("fsdp", "LoRA", "factory"),
        ("fsdp", "full", "factory"),
    ],
)
def test_trainer_takes_the_steps_of_one_process_and_resumes_to_the_bit(ranks, mode, kind, path, tmp_path):
    run = {"mode": mode, "kind": kind, "path": path}
    whole = ranks(2, parallel_trainer.train, folder=str(tmp_path / "whole"), **run)
    saved = str(tmp_path / "whole" / "checkpoint-3")
    resumed = ranks(2, parallel_trainer.train, folder=str(tmp_path / "resumed"), resume=saved, **run)
    weights, logs = parallel_trainer.train(str(tmp_path / "one"), None, kind, path)

    assert max(entry["safegrad/conflict_rate"] for entry in logs) == 1.0
    assert len(logs) == 6
    for (found, found_logs), (again, again_logs) in zip(whole, resumed, strict=True):
        assert distance(found, weights) <= BOUND
        assert [entry["safegrad/conflict_rate"] for entry in found_logs] == [
            entry["safegrad/conflict_rate"] for entry in logs
        ]
        assert distance(again, found) == 0.0
        assert again_logs == found_logs


def test_trainer_under_fsdp_takes_no_optimizer_made_before(ranks, tmp_path):
    arguments = {"folder": str(tmp_path), "mode": "fsdp", "kind": "LoRA", "path": "optimizers"}
    with pytest.raises(RankError, match="optimizers"):
        ranks(2, parallel_trainer.train, **arguments)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_accelerate_takes_the_steps_of_one_process_and_resumes_to_the_bit(ranks, mode, tmp_path):
    whole = ranks(2, parallel_accelerate.train, folder=str(tmp_path / "whole"), mode=mode)
    resumed = ranks(2, parallel_accelerate.train, folder=str(tmp_path / "whole"), mode=mode, start=2)
    expected, counts = parallel_accelerate.train(str(tmp_path / "one"), None)
    assert counts[1] > 0
    for (found, found_counts), (again, again_counts) in zip(whole, resumed, strict=True):
        assert distance(found, expected) <= BOUND
        assert distance(again, found) == 0.0
        assert found_counts == again_counts == counts
