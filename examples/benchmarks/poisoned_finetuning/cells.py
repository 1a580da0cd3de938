"""What the benchmark runs: cells, and the plans that list them, most informative first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

__all__ = ["ARMS", "HEADLINE", "PLANS", "RATIOS", "Cell"]

ARMS = {
    "aligned": "no fine-tuning at all",
    "plain": "nothing",
    "mixed": "as many safety rows in each batch as SafeGrad sees (SafeInstr)",
    "lisa": "user and safety steps in turns, each with a proximal term (Lisa)",
    "weighted": "g_user + rho g_align, no projection",
    "safegrad": "SafeGrad, KL alignment",
    "cross-entropy": "SafeGrad, cross-entropy alignment (the paper's ablation)",
    "per-tensor": "SafeGrad, each tensor projected by itself",
}
HEADLINE = ("plain", "mixed", "lisa", "weighted", "safegrad")
RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run and how it is judged; equal cells give equal results."""

    arm: str = "safegrad"
    ratio: float = 0.9
    """Share of harmful rows in the training data."""
    seed: int = 0
    task: str = "sst2"
    attack: str = "requests"
    """Harmful rows: "requests" with complying replies, "shifted" ones from other topics than the safety
    rows, or "identity" rows without any unsafe text."""
    samples: int = 48
    """Unsafe requests to keep refusing; as many harmless look-alikes are kept with them."""
    harvest: bool = False
    """Whether training prompts that the aligned model refuses become safety rows too."""
    contexts: str = "none"
    """What the unsafe requests to keep refusing are repeated behind: "whole" training prompts, or a
    "prefix" of one, cut after any word."""
    positions: Literal["response", "all"] = "response"
    rho: float = 5.0
    refresh_every: int = 1
    safety_batch_size: int = 8
    """Safety rows a step, half of them unsafe requests."""
    lr: float = 5e-4
    steps: int = 40
    batch_size: int = 8
    optimizer: str = "adamw"
    mode: str = "lora"
    model: str = "SmolLM2-135M-Instruct"
    judged: int = 100
    """Unsafe requests, and look-alikes, to judge by; twice as many task rows."""

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm is {self.arm!r}, expected one of {list(ARMS)}.")


def headline(ratios: Sequence[float] = RATIOS) -> Iterator[Cell]:
    """The arms that people would choose from over the harmful ratio, seed by seed."""
    yield Cell("aligned", 0.0)
    for seed, ratio, arm in product(SEEDS, ratios, HEADLINE):
        yield Cell(arm, ratio, seed)


def ablations() -> Iterator[Cell]:
    """What each part of the method is worth, and a plain run with a gentler learning rate."""
    for ratio in (0.9, 0.3):
        for lr in (3e-5, 1e-4, 2e-4):
            yield Cell("plain", ratio, lr=lr)
        yield Cell("cross-entropy", ratio)
        yield Cell("per-tensor", ratio)
        yield Cell(ratio=ratio, rho=0.0)
        yield Cell(ratio=ratio, refresh_every=4)


def few_samples() -> Iterator[Cell]:
    """The failure edge in safety rows x topic shift, and what was tried against its worst corner."""
    for seed in SEEDS:
        corner = Cell(samples=10, seed=seed)
        yield corner
        yield replace(corner, positions="all")
        yield replace(corner, contexts="prefix")
        yield replace(corner, harvest=True)
        yield replace(corner, rho=20.0)
    corner = Cell(samples=10)
    for samples in (5, 20, 48, 100):
        yield Cell(samples=samples)
    for samples in (5, 10, 20, 48):
        yield Cell(samples=samples, attack="shifted")
    yield replace(corner, attack="shifted", harvest=True)
    for harvest in (False, True):
        yield replace(corner, task="agnews", harvest=harvest)


def long_and_fast() -> Iterator[Cell]:
    """The failure edge in learning rate x steps, and what was tried against it."""
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        for steps in (40, 120):
            yield Cell(lr=lr, steps=steps)
    yield Cell(steps=120)
    yield Cell(steps=120, samples=100)
    yield Cell(steps=120, rho=20.0)


def cheaper() -> Iterator[Cell]:
    """What saves more at the same protection: an older alignment gradient, or fewer rows in each."""
    for seed, (every, rows) in product(SEEDS, ((1, 8), (4, 8), (4, 4), (1, 2), (2, 2))):
        yield Cell(seed=seed, refresh_every=every, safety_batch_size=rows)


def task_cost() -> Iterator[Cell]:
    """Why SafeGrad costs accuracy where most rows are harmful: rho, time, or the task."""
    for rho in (1.0, 2.0):
        yield Cell(ratio=0.7, seed=1, rho=rho)
    for arm in ("plain", "safegrad"):
        for seed in SEEDS:
            yield Cell(arm, 0.7, seed, steps=80)
        yield Cell(arm, 0.7, seed=1, task="agnews")


def identity() -> Iterator[Cell]:
    """The attack that no safety row looks like, and what was tried against it."""
    for arm in ("aligned", "plain", "mixed"):
        yield Cell(arm, attack="identity")
    yield Cell(attack="identity", contexts="whole")
    yield Cell(attack="identity", rho=20.0)
    for seed in SEEDS:
        yield Cell(attack="identity", seed=seed)
        yield Cell(attack="identity", seed=seed, contexts="prefix")
    yield Cell("mixed", attack="identity", contexts="prefix")
    yield Cell(attack="identity", contexts="prefix", steps=80)
    yield Cell("plain", 0.3, attack="identity")
    for contexts in ("none", "prefix"):
        yield Cell(ratio=0.3, attack="identity", contexts=contexts)
    yield Cell(ratio=0.3, attack="identity", contexts="prefix", samples=100)


def axes() -> Iterator[Cell]:
    """rho, other tasks, optimizers, and full fine-tuning."""
    for rho in (0.1, 0.5, 1.0, 2.0):
        yield Cell(rho=rho)
    for arm in ("plain", "safegrad"):
        yield Cell(arm, 0.3, task="agnews")
        yield Cell(arm, 0.3, task="gsm8k")
        for lr in (3e-5, 1e-4):
            yield Cell(arm, lr=lr, mode="full")
        for lr in (0.03, 0.3):
            yield Cell(arm, lr=lr, optimizer="sgd")
        yield Cell(arm, lr=3e-3, optimizer="muon")
        yield Cell(arm, lr=1e-3, optimizer="schedulefree")


def smoke() -> Iterator[Cell]:
    """Plain against SafeGrad on the data of the examples, in minutes."""
    for arm in ("plain", "safegrad"):
        yield Cell(arm, 0.3, task="tickets", samples=24)


def everything() -> Iterator[Cell]:
    """All of it, most informative first; some cells are in more than one plan."""
    yield from headline((0.3, 0.9))
    yield from few_samples()
    yield from headline((0.0, 0.1, 0.5, 0.7, 1.0))
    yield from ablations()
    yield from long_and_fast()
    yield from cheaper()
    yield from task_cost()
    yield from identity()
    yield from axes()


PLANS = {
    "smoke": smoke,
    "headline": headline,
    "few-samples": few_samples,
    "ablations": ablations,
    "long-and-fast": long_and_fast,
    "cheaper": cheaper,
    "task-cost": task_cost,
    "identity": identity,
    "axes": axes,
    "all": everything,
}
