"""Means, intervals and tests over seeds.

Below five seeds there is no interval: a band is the lowest to the highest of them (with three seeds that covers the
true mean about three times in four). From five on it is Student's t interval of the mean. A claim is decided by an
exact permutation of the labels within each task, and by Holm's correction over the tested claims of a paper.
"""

import math
from itertools import combinations

import numpy as np
from scipy.stats import t as student

FEW = 5  # seeds from which on there is an interval
Block = tuple[np.ndarray, np.ndarray]  # values (n, C) and (m, C) of two labels in one task, C numbers for each run


def interval(values, share: bool = False) -> tuple[float, float]:
    """Lowest and highest of fewer than five values, of more the 95% t interval of their mean; of a share, clipped."""
    values = np.asarray(values, float)
    if len(values) < FEW:
        return values.min(), values.max()
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    low, high = values.mean() - half, values.mean() + half
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def difference(blocks: list[Block], relative: bool) -> list[tuple[float, float]]:
    """one - other and half its 95% interval by Welch's t, for each of C numbers; the mean over the blocks.

    `relative`: in each block divided by |mean of other|, which is taken as known. Infinite where a label has one run.
    """
    result = []
    for c in range(blocks[0][0].shape[1]):
        estimates, parts = [], []  # a part is the variance of a mean and its degrees of freedom
        for one, other in blocks:
            scale = abs(other[:, c].mean()) if relative else 1.0
            estimates.append((one[:, c].mean() - other[:, c].mean()) / scale)
            for values in (one[:, c], other[:, c]):
                single = len(values) < 2
                variance = math.inf if single else values.var(ddof=1) / len(values) / (scale * len(blocks)) ** 2
                parts.append((variance, len(values) - 1))
        total = sum(variance for variance, _ in parts)
        half = 0.0 if total == 0 else math.inf
        if 0 < total < math.inf:  # Welch and Satterthwaite's degrees of freedom
            half = student.ppf(0.975, total**2 / sum(v**2 / n for v, n in parts)) * math.sqrt(total)
        result.append((float(np.mean(estimates)), half))
    return result


def scores(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """One number for each run of both (n + m,): the mean of its C numbers, each standardised over all the runs.

    No exchange of labels changes these.
    """
    pooled = np.concatenate([one, other])
    std = pooled.std(0)
    return ((pooled - pooled.mean(0)) / np.where(std > 0, std, 1)).mean(1)


def direction(blocks: list[Block]) -> float:
    """What permutation() tests: the sum over the blocks of the difference of mean scores, one - other."""
    both = [(scores(one, other), len(one)) for one, other in blocks]
    return float(sum(score[:n].mean() - score[n:].mean() for score, n in both))


def permutation(blocks: list[Block]) -> float:
    """Two-sided p: the share of all exchanges of labels within blocks whose direction() is at least as far from 0."""
    halves = [np.zeros(1), np.zeros(1)]  # sums over the blocks of each half, so that only pairs of them are counted
    for one, other in blocks:
        score, n, m = scores(one, other), len(one), len(other)
        sums = score[np.array(list(combinations(range(n + m), n)))].sum(1)
        halves.sort(key=len)
        halves[0] = np.add.outer(halves[0], sums / n - (score.sum() - sums) / m).ravel()
    bound = abs(direction(blocks)) - 1e-9  # equal sums may differ in their last bits
    if bound <= 0:
        return 1.0
    first, second = halves[0], np.sort(halves[1])
    above = len(second) - np.searchsorted(second, bound - first, "left")
    below = np.searchsorted(second, -bound - first, "right")
    return float((above.sum() + below.sum()) / (len(first) * len(second)))


def holm(p: list[float]) -> list[float]:
    """p after Holm's correction for all of them."""
    adjusted, highest = [1.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def number(x: float) -> str:
    """Two or three digits, or all before the point."""
    text = f"{x:,.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.3f}"
    return "0" if float(text.replace(",", "")) == 0 else text


def summary(values, share: bool = False) -> str:
    """`2,129 (960 to 3,044)`: mean and range of fewer than five seeds; `0.71 [0.66, 0.76]`: mean and t interval."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return "-"
    low, high = map(number, interval(values, share))
    if len(values) == 1:
        return low
    mean = number(values.mean())
    return f"{mean} ({low} to {high})" if len(values) < FEW else f"{mean} [{low}, {high}]"
