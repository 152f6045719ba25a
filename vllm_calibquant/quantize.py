"""From numbers to codes: range estimators, and rounding to ``b`` bits.

A range estimator is a small frozen dataclass in :data:`RANGE_ESTIMATORS`; a new one is a class and
an entry.  Everything is per channel over tokens that share a range, those of one visual page
(CalibQuant v1 calls that a group) or of one request, with tokens in dimension -2 and channels in
dimension -1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

Ends = tuple[torch.Tensor, torch.Tensor]
"""``lo`` and ``hi``, float32 ``[..., 1, D]`` each, ``lo <= hi``."""

Weight = float | torch.Tensor
"""A number, or one for each component: ``[D]``."""

LLOYD_STEPS = 12
"""Steps of Lloyd's algorithm: at 1 bit the ends move by less than 1 % of the range after these."""


class RangeEstimator(ABC):
    """Finds the interval that the levels of a channel span."""

    factor: Weight

    @property
    def weights(self) -> tuple[Weight, Weight] | None:
        """Weights a and b, if the ends are ``a m + b M`` and ``a M + b m`` of two order
        statistics m and M.

        These are what kernels can compute (``csrc_triton/store.py``).
        """
        return None

    @abstractmethod
    def __call__(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Estimate ranges.

        Parameters
        ----------
        x
            float32 ``[..., tokens, D]``.
        valid
            bool ``[..., tokens, 1]``, True where a token exists; at least one does.
        levels
            float32 ``[D]``: L = 2**bits - 1 of each component, at least 1.

        Returns
        -------
        lo, hi : torch.Tensor
            float32 ``[..., 1, D]``, ``lo <= hi``.
        """

    def coding(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends | None:
        """The interval against which codes are taken, if it is not that of the levels.

        Parameters and result are those of a call.
        """
        return None


def extremes(x: torch.Tensor, valid: torch.Tensor) -> Ends:
    """Smallest and largest value of each channel over the tokens that exist."""
    lo = x.masked_fill(~valid, float("inf")).amin(-2, keepdim=True)
    hi = x.masked_fill(~valid, float("-inf")).amax(-2, keepdim=True)
    return lo, hi


def nearest(
    x: torch.Tensor, lo: torch.Tensor, step: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """``round(clamp((x - lo) / step, 0, L))``, and 0 where the step is."""
    codes = torch.where(step > 0, (x - lo) / step, 0.0)
    return torch.minimum(codes.clamp(min=0.0), levels).round()


def shrunk(ends: Ends, factor: Weight) -> Ends:
    """A range of ``factor`` times the width with the same midpoint."""
    lo, hi = ends
    a, b = (1 + factor) / 2, (1 - factor) / 2
    return lo * a + hi * b, hi * a + lo * b


@dataclass(frozen=True)
class MinMax(RangeEstimator):
    """Extremes of a channel times a factor: ``lo = c min x``, ``hi = c max x``.

    The authors' code for CalibQuant (arXiv 2502.14882) has c = 0.5 for K and 0.3 for V at 1 bit.
    It shrinks ranges towards zero, which suits channels on both sides of it: where keys have a bias
    a small c moves the range off the values.  A profile has a factor for each component, ``[D]``.
    """

    factor: Weight = 1.0

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """Of the extremes; see :class:`RangeEstimator`."""
        return self.factor, 0.0

    def __call__(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Estimate ranges; see :class:`RangeEstimator`."""
        lo, hi = extremes(x, valid)
        return lo * self.factor, hi * self.factor


@dataclass(frozen=True)
class Midpoint(RangeEstimator):
    """Extremes of a channel, drawn together around their midpoint.

    ``lo = m - c h`` and ``hi = m + c h`` with ``m = (min x + max x) / 2`` and
    ``h = (max x - min x) / 2``.  Ours: the bias of a channel moves the range along, whatever c is,
    and values that are rare in a page keep a level of their own, however common the others are:
    attention looks for print, and most of a page is paper.
    """

    factor: Weight = 1.0

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """Of the extremes; see :class:`RangeEstimator`."""
        return (1 + self.factor) / 2, (1 - self.factor) / 2

    def __call__(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Estimate ranges; see :class:`RangeEstimator`."""
        return shrunk(extremes(x, valid), self.factor)


@dataclass(frozen=True)
class Quantile(RangeEstimator):
    """Quantiles of a channel times a factor: ``lo = c Q(alpha)``, ``hi = c Q(1 - alpha)``.

    The first version of CalibQuant ("From 16-Bit to 1-Bit", arXiv 2502.14882 v1).
    """

    factor: Weight = 1.0
    alpha: float = 0.02

    @property
    def weights(self) -> tuple[Weight, Weight]:
        """Of the quantiles; see :class:`RangeEstimator`."""
        return self.factor, 0.0

    def __call__(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Estimate ranges; see :class:`RangeEstimator`."""
        x = x.masked_fill(~valid, float("nan"))
        ends = torch.tensor([self.alpha, 1.0 - self.alpha], dtype=x.dtype, device=x.device)
        lo, hi = torch.nanquantile(x, ends, dim=-2, keepdim=True)
        return lo * self.factor, hi * self.factor


class _Moments(NamedTuple):
    """Second moments of codes and values of each channel over the tokens that exist."""

    mean_x: torch.Tensor
    mean_code: torch.Tensor
    var_x: torch.Tensor
    var_code: torch.Tensor
    cov: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, valid: torch.Tensor, ends: Ends, levels: torch.Tensor) -> _Moments:
        """Moments of the values and of their codes in a range."""
        codes = nearest(x, ends[0], (ends[1] - ends[0]) / levels, levels)
        codes = torch.where(valid, codes, 0.0)
        share = valid / valid.sum(-2, keepdim=True)
        x = torch.where(valid, x, 0.0)
        mean_x, mean_code = ((t * share).sum(-2, keepdim=True) for t in (x, codes))
        dx, dc = x - mean_x, codes - mean_code
        return cls(
            mean_x,
            mean_code,
            *((s * t * share).sum(-2, keepdim=True) for s, t in ((dx, dx), (dc, dc), (dx, dc))),
        )

    def ends(self, step: torch.Tensor, levels: torch.Tensor, before: Ends) -> Ends:
        """The range with a step whose mean is that of the values; as before if all codes agree."""
        found = (self.var_code > 0) & (self.cov > 0)
        lo = self.mean_x - step * self.mean_code
        return torch.where(found, lo, before[0]), torch.where(found, lo + step * levels, before[1])


def least_squares(x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
    """Ends of the evenly spaced levels nearest to a channel's values, by Lloyd's algorithm."""
    ends = extremes(x, valid)
    for _ in range(LLOYD_STEPS):
        m = _Moments.of(x, valid, ends, levels)
        ends = m.ends(m.cov / m.var_code.clamp(min=1e-30), levels, ends)
    return ends


@dataclass(frozen=True)
class TwoMeans(RangeEstimator):
    """Least squares: the evenly spaced levels nearest to a channel's values, around their midpoint.

    At 1 bit the levels are the means of the values on either side of the levels' midpoint, as in
    two-means clustering.  Lloyd's algorithm ("Least squares quantization in PCM", 1982) from the
    extremes: codes with the range at hand, then the regression of values on codes,
    ``s = cov(code, x) / var(code)`` and ``lo = mean x - s mean code``.  The range is drawn
    together by the factor in the end.
    """

    factor: Weight = 1.0

    def __call__(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Estimate ranges; see :class:`RangeEstimator`."""
        return shrunk(least_squares(x, valid, levels), self.factor)


@dataclass(frozen=True)
class UnbiasedSlope(RangeEstimator):
    """Levels with which what is read is, on average, as far from the mean as what was stored.

    Least-squares levels draw values towards their mean: regressed on x, ``x_hat`` has a slope below
    1, and so have scores and outputs.  Here codes are those of :class:`TwoMeans`, and
    ``s = var(x) / cov(code, x)``, ``lo = mean x - s mean code``, which makes the slope 1 (RaBitQ,
    arXiv 2405.12497, makes its inner products unbiased in this way).  The levels are drawn together
    by the factor in the end.
    """

    factor: Weight = 1.0

    def __call__(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Estimate ranges; see :class:`RangeEstimator`."""
        ends = least_squares(x, valid, levels)
        m = _Moments.of(x, valid, ends, levels)
        return shrunk(m.ends(m.var_x / m.cov.clamp(min=1e-30), levels, ends), self.factor)

    def coding(self, x: torch.Tensor, valid: torch.Tensor, levels: torch.Tensor) -> Ends:
        """Least-squares ends; see :class:`RangeEstimator`."""
        return least_squares(x, valid, levels)


RANGE_ESTIMATORS: dict[str, type[RangeEstimator]] = {
    "minmax": MinMax,
    "midpoint": Midpoint,
    "quantile": Quantile,
    "two-means": TwoMeans,
    "unbiased-slope": UnbiasedSlope,
}


def encode(
    x: torch.Tensor,
    valid: torch.Tensor,
    bits: torch.Tensor,
    estimator: RangeEstimator,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code tokens; those of dimension -2 share the range of a channel.

    ``s = (hi - lo) / L`` and ``code = round(clamp((x - lo) / s, 0, L))`` with ``L = 2**b - 1``
    (CalibQuant, Eq. 2 and 3), so that ``x ~ lo + s code``.  Scale and offset are rounded to
    ``dtype`` first and codes are taken against the rounded values, which are what readers see,
    unless the estimator has an interval for codes of its own.  A channel without extent has scale 0
    and codes 0, and one of no bits keeps its mean as offset.

    Parameters
    ----------
    x
        float32 ``[..., tokens, D]``.
    valid
        bool ``[..., tokens, 1]``, True where a token exists.
    bits
        int64 ``[D]`` bits of each component.
    estimator
        Range of each channel.
    dtype
        Dtype of scale and offset.

    Returns
    -------
    codes : torch.Tensor
        uint8 ``[..., tokens, D]``; 0 where no token exists.
    scale, offset : torch.Tensor
        ``[..., 1, D]`` in ``dtype``.
    """
    levels = ((1 << bits) - 1).to(x.dtype)
    some = levels.clamp(min=1)
    lo, hi = estimator(x, valid, some)
    scale = torch.where(levels > 0, (hi - lo) / some, 0.0).to(dtype)
    mean = x.masked_fill(~valid, 0.0).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True)
    offset = torch.where(levels > 0, lo, mean).to(dtype)
    inner = estimator.coding(x, valid, some)
    if inner is None:
        codes = nearest(x, offset.to(x.dtype), scale.to(x.dtype), levels)
    else:
        codes = nearest(x, inner[0], (inner[1] - inner[0]) / some, levels)
    return codes.masked_fill(~valid, 0.0).to(torch.uint8), scale, offset
