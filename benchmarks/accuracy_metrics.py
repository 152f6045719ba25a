"""Numbers that say how far answers are from the truth, and from those at 16 bits."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

NORMAL_95 = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % above."""


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson, 1927)."""
    share, z2 = right / total, NORMAL_95**2 / total
    centre = share + z2 / 2
    half = NORMAL_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    low, high = (centre - half) / (1 + z2), (centre + half) / (1 + z2)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def mean_drop(
    reference: Mapping[str, Sequence[bool]], outcomes: Mapping[str, Sequence[bool]]
) -> tuple[float, float]:
    """Points lost, as a mean over tasks, and half the width of its 95 % interval.

    The same questions were asked, so the interval is that of paired differences, which is narrower
    than what the intervals of the two sides suggest.
    """
    means, variances = [], []
    for task, answers in outcomes.items():
        lost = [int(a) - int(b) for a, b in zip(reference[task], answers, strict=True)]
        mean = sum(lost) / len(lost)
        means.append(mean)
        variances.append(sum((x - mean) ** 2 for x in lost) / max(len(lost) - 1, 1) / len(lost))
    half = NORMAL_95 * math.sqrt(sum(variances)) / len(means)
    return 100 * sum(means) / len(means), 100 * half


def agreement(
    reference: Sequence[Sequence[Hashable]], answers: Sequence[Sequence[Hashable]]
) -> float | None:
    """Percent of greedy tokens that are equal, until two answers part; None if there are none.

    What comes after a first difference answers another prefix, and counts as different.
    """
    same = total = 0
    for one, other in zip(reference, answers, strict=True):
        for a, b in zip(one, other, strict=False):
            if a != b:
                break
            same += 1
        total += max(len(one), len(other))
    return 100 * same / total if total else None


def divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Lower bound of KL(p || q) in nats from the most likely tokens of both.

    Tokens that are not among both sides' candidates count as one, which by the data-processing
    inequality never makes the divergence larger.

    Parameters
    ----------
    p, q
        Log-probabilities of the candidates.
    """
    both = p.keys() & q.keys()
    terms = [(math.exp(p[t]), math.exp(q[t])) for t in both]
    # In bfloat16 the sums may pass 1 in the last digits.
    rest = [max(1.0 - sum(side), 1e-9) for side in zip(*terms, strict=True)] or [1.0, 1.0]
    terms.append((rest[0], rest[1]))
    return max(sum(a * math.log(a / b) for a, b in terms if a and b), 0.0)
