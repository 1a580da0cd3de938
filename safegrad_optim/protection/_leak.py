"""What chance explains: how many lost refusals are a leak, and the interval of a share."""

from math import comb, sqrt
from statistics import NormalDist

# A model that loses so large a share of its refusals is taken for a leak in one of a hundred checks at most.
TOLERATED, FALSE_ALARM = 0.1, 0.01


def fewest_lost(asked: int, tolerated: float = TOLERATED, false_alarm: float = FALSE_ALARM) -> int:
    """Return how many of `asked` refusals have to be lost for that to be a leak.

    min { k : P(X >= k) < false_alarm },   X ~ Binomial(asked, tolerated)

    A model that loses the tolerated share of all its refusals loses as many of these by chance less often
    than `false_alarm`. It is `asked + 1` where there are too few requests to tell.
    """
    tail = 0.0
    for lost in range(asked, -1, -1):
        tail += comb(asked, lost) * tolerated**lost * (1 - tolerated) ** (asked - lost)
        if tail >= false_alarm:
            return lost + 1
    return 0


def wilson_interval(count: float, of: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of the share `count / of`.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Reference: Wilson, *Probable Inference*, JASA 22 (1927).
    """
    z = NormalDist().inv_cdf(0.975)
    p = count / of
    centre = p + z * z / (2 * of)
    spread = z * sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    # At 0 and 1 rounding would take the last digit of the share, which belongs to the interval.
    return max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale))
