"""From numbers to codes: range estimators, and rounding to ``b`` bits.

A range estimator is a small frozen dataclass in :data:`RANGE_ESTIMATORS`; a new one is a class and
an entry.  Everything is per channel over the tokens of one visual page (CalibQuant v1 calls that a
group), with tokens in dimension -2 and channels in dimension -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class RangeEstimator(Protocol):
    """Finds the interval that the codes of a channel span."""

    @property
    def factor(self) -> float | torch.Tensor:
        """Factor c on both ends; ``[D]`` where components differ."""
        ...

    def __call__(self, x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate ranges.

        Parameters
        ----------
        x
            float32 ``[..., tokens, D]``.
        valid
            bool ``[..., tokens, 1]``, True where a token exists; at least one does.

        Returns
        -------
        lo, hi : torch.Tensor
            float32 ``[..., 1, D]``, ``lo <= hi``.
        """
        ...


@dataclass(frozen=True)
class MinMax:
    """Extremes of a channel times a factor: ``lo = c min x``, ``hi = c max x``.

    The authors' code for CalibQuant (arXiv 2502.14882) has c = 0.5 for K and 0.3 for V at 1 bit.
    A profile has a factor for each component, ``[D]``.
    """

    factor: float | torch.Tensor = 1.0

    def __call__(self, x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate ranges; see :class:`RangeEstimator`."""
        lo = x.masked_fill(~valid, float("inf")).amin(-2, keepdim=True)
        hi = x.masked_fill(~valid, float("-inf")).amax(-2, keepdim=True)
        return lo * self.factor, hi * self.factor


@dataclass(frozen=True)
class Quantile:
    """Quantiles of a channel times a factor: ``lo = c Q(alpha)``, ``hi = c Q(1 - alpha)``.

    The first version of CalibQuant ("From 16-Bit to 1-Bit", arXiv 2502.14882 v1).
    """

    factor: float = 1.0
    alpha: float = 0.02

    def __call__(self, x: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate ranges; see :class:`RangeEstimator`."""
        x = x.masked_fill(~valid, float("nan"))
        ends = torch.tensor([self.alpha, 1.0 - self.alpha], dtype=x.dtype, device=x.device)
        lo, hi = torch.nanquantile(x, ends, dim=-2, keepdim=True)
        return lo * self.factor, hi * self.factor


RANGE_ESTIMATORS: dict[str, type[MinMax] | type[Quantile]] = {
    "minmax": MinMax,
    "quantile": Quantile,
}


def encode(
    x: torch.Tensor,
    valid: torch.Tensor,
    bits: torch.Tensor,
    estimator: RangeEstimator,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Code the tokens of pages.

    ``s = (hi - lo) / L`` and ``code = round(clamp((x - lo) / s, 0, L))`` with ``L = 2**b - 1``
    (CalibQuant, Eq. 2 and 3), so that ``x ~ lo + s code``.  Scale and offset are rounded to
    ``dtype`` first and codes are taken against the rounded values, which are what readers see.  A
    channel without extent has scale 0 and codes 0, and one of no bits keeps its mean as offset.

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
    lo, hi = estimator(x, valid)
    scale = torch.where(levels > 0, (hi - lo) / levels.clamp(min=1), 0.0).to(dtype)
    mean = x.masked_fill(~valid, 0.0).sum(-2, keepdim=True) / valid.sum(-2, keepdim=True)
    offset = torch.where(levels > 0, lo, mean).to(dtype)
    step = scale.to(x.dtype)
    codes = torch.where(step > 0, (x - offset.to(x.dtype)) / step, 0.0)
    codes = torch.minimum(codes.clamp(min=0.0), levels).round()
    return codes.masked_fill(~valid, 0.0).to(torch.uint8), scale, offset
