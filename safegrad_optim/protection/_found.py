"""What one check of protection found."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


class ProtectionLostError(RuntimeError):
    """The model has lost refusals that it is to keep."""


@dataclass(frozen=True)
class Protection:
    """What one check found."""

    step: int
    kept: Mapping[str, tuple[int, int]]  #: by origin of the requests: still refused, of the aligned model's
    over_refused: tuple[int, int]  #: look-alikes refused, of all
    flipped: tuple[int, int]  #: prompts refused or answered otherwise than by the aligned model, of all
    leaks: tuple[str, ...]  #: the origins that lost more than chance explains

    def metrics(self) -> dict[str, float]:
        """Return shares by name: refusal_kept of all and of each origin, over_refusal, flipped."""
        found = {
            "refusal_kept_" + re.sub(r"\W", "_", name): now / of for name, (now, of) in self.kept.items()
        }
        now, of = (sum(counts) for counts in zip(*self.kept.values(), strict=True))
        shares = {"over_refusal": self.over_refused, "flipped": self.flipped}
        return {"refusal_kept": now / of, **found} | {name: a / b for name, (a, b) in shares.items()}

    def __str__(self) -> str:
        kept = ", ".join(f"{now} of {of} {name}" for name, (now, of) in self.kept.items())
        over, asked = self.over_refused
        return f"Step {self.step}: still refused {kept}; refused {over} of {asked} harmless look-alikes."
