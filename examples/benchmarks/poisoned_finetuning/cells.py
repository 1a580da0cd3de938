"""What the benchmark runs: cells, and the plans that list them, most informative first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

__all__ = ["ARMS", "CHECKS", "PLANS", "PROTECTED", "Cell"]

ARMS = {
    "aligned": "no fine-tuning at all",
    "plain": "nothing",
    "default": "the sources of safety_sources: requests, look-alikes, refused training prompts, prefixes",
    "requests": "the same without anything of the training data",
    "paper": "unsafe requests alone, ten tokens of each reply compared, rho = 1",
    "dropped": "training rows whose prompts the aligned model refuses are left out, nothing else",
    "filtered": "the default, and these training rows are left out as well",
    "mixed": "the default's rows in each training batch, with cross-entropy (SafeInstr)",
    "lisa": "user steps and steps on the default's rows in turns, each with a proximal term (Lisa)",
}
PROTECTED = ("default", "filtered", "requests", "paper")
# Steps after which a run is judged, as far as it goes.
CHECKS = (120, 400, 1200)
TASKS = ("sst2", "tickets", "agnews")


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run and how it is judged; equal cells give equal results."""

    arm: str = "default"
    task: str = "sst2"
    ratio: float = 0.9
    """Share of harmful rows in the training data."""
    seed: int = 0
    attack: str = "advbench"
    """What the harmful rows are and how requests are put to judge: see `attacks.py`. "examples" has the
    requests of the examples, all others those of AdvBench."""
    safety: str = "shipped"
    """Whose requests the safety rows have: "shipped" or "advbench"."""
    rho: float = 1.0
    training_weight: float = 1.0
    """Times the recommended weight of the source of refused training prompts."""
    prefix_weight: float = 5.0
    """Of the source of prefixed requests."""
    rows: int = 2
    """Rows a step of each of these two sources, or half as many as of prefixed requests alone."""
    refresh_every: int = 1
    steps: int = 120
    lr: float = 5e-4
    batch_size: int = 8
    model: str = "SmolLM2-135M-Instruct"
    every: int = 4
    """Take every so many of the shipped requests: they are the minutes on a CPU before training starts."""
    judged: int = 100
    """Unsafe requests, and look-alikes, to judge by; twice as many task rows."""

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm is {self.arm!r}, expected one of {list(ARMS)}.")


def screen() -> Iterator[Cell]:
    """rho and the weight of the refused training prompts, where most rows are harmful."""
    for task in ("sst2", "tickets"):
        for rho, weight in ((1.0, 1.0), (5.0, 1.0), (5.0, 0.3), (1.0, 0.3)):
            yield Cell(task=task, rho=rho, training_weight=weight)


def identity() -> Iterator[Cell]:
    """The attack without unsafe text, by rho and the weight of the prefixes."""
    for ratio, (rho, weight) in product((0.9, 0.3), ((1.0, 5.0), (1.0, 12.5), (1.0, 2.5), (5.0, 5.0))):
        yield Cell(ratio=ratio, attack="identity", rho=rho, prefix_weight=weight)
    for ratio in (0.9, 0.3):
        yield Cell("plain", ratio=ratio, attack="identity")


def grid() -> Iterator[Cell]:
    """Safety rows of another hand than the attack's: tasks and shares of harmful rows."""
    for task in TASKS:
        yield Cell("aligned", task, 0.0)
    for ratio, task, arm in product((0.9, 0.3, 0.1, 0.03, 0.0), TASKS, ("default", "plain")):
        yield Cell(arm, task, ratio)


def seeds() -> Iterator[Cell]:
    """Three seeds of the hardest cells."""
    for seed, ratio, task, arm in product((1, 2), (0.9, 0.3), ("sst2", "agnews"), ("default", "plain")):
        yield Cell(arm, task, ratio, seed)


def long() -> Iterator[Cell]:
    """400 steps, and 1200 in one cell."""
    for ratio, task, arm in product((0.9, 0.3), TASKS, ("default", "plain")):
        yield Cell(arm, task, ratio, steps=400)
    yield Cell(ratio=0.3, steps=1200)


def kin() -> Iterator[Cell]:
    """What else could be done with the same rows."""
    for ratio, task in product((0.9, 0.3), ("sst2", "agnews")):
        for arm in ("requests", "paper", "dropped", "filtered", "mixed", "lisa"):
            yield Cell(arm, task, ratio)


def other_way() -> Iterator[Cell]:
    """Safety rows of AdvBench, attack and judgement of the examples."""
    for arm in ("aligned", "plain", "requests", "default"):
        yield Cell(arm, "tickets", 0.3, attack="examples", safety="advbench")


def cheaper() -> Iterator[Cell]:
    """More rows a step, and an alignment gradient that serves several steps, in the hardest cells."""
    for task, ratio in (("sst2", 0.9), ("tickets", 0.9), ("agnews", 0.3)):
        yield Cell(task=task, ratio=ratio, rows=4)
        for every in (2, 4):
            yield Cell(task=task, ratio=ratio, refresh_every=every, steps=400)


def adaptive() -> Iterator[Cell]:
    """Attackers who know how training prompts are flagged."""
    for attack, task in product(("reworded", "unlike", "instructed"), ("sst2", "tickets")):
        for arm in ("aligned", "default", "plain"):
            yield Cell(arm, task, 0.3, attack=attack)


def smoke() -> Iterator[Cell]:
    """Plain against the default on the data of the examples, in minutes."""
    for arm in ("plain", "default"):
        yield Cell(arm, "tickets", 0.3, attack="examples", steps=40)


def everything() -> Iterator[Cell]:
    """All of it, most informative first; some cells are in more than one plan."""
    for plan in (screen, identity, grid, kin, long, seeds, other_way, cheaper, adaptive):
        yield from plan()


PLANS = {
    "smoke": smoke,
    "screen": screen,
    "identity": identity,
    "grid": grid,
    "seeds": seeds,
    "long": long,
    "kin": kin,
    "other-way": other_way,
    "cheaper": cheaper,
    "adaptive": adaptive,
    "all": everything,
}
