"""Where a run stands, kept until it is finished, so that it goes on after a kill."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.poisoned_finetuning.cells import Cell

__all__ = ["State"]


class State:
    """What a run needs to go on, in a file beside the results until it is finished."""

    def __init__(self, results: Path, cell: Cell, model: Any, optimizer: torch.optim.Optimizer) -> None:
        name = hashlib.sha256(json.dumps(asdict(cell)).encode()).hexdigest()[:16]
        self.path = results.with_suffix(".states") / f"{name}.pt"
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer

    def load(self) -> int:
        """Put back what was saved, and return the number of steps taken."""
        if not self.path.is_file():
            return 0
        saved = torch.load(self.path)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(saved["weights"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        return int(saved["taken"])

    def save(self, taken: int) -> None:
        """Keep what is there after so many steps."""
        self.path.parent.mkdir(exist_ok=True)
        partial_path = self.path.with_suffix(".partial")
        state = {"weights": self.weights, "optimizer": self.optimizer.state_dict(), "taken": taken}
        torch.save(state, partial_path)
        partial_path.replace(self.path)

    def remove(self) -> None:
        """Forget it."""
        for path in (self.path, self.path.with_suffix(".partial")):
            path.unlink(missing_ok=True)
