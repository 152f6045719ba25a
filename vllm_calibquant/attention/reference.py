"""Attention over exact and coded tokens in plain PyTorch: what every kernel is tested against.

Keys and values of visual tokens are never dequantised. With scale ``s`` and offset ``o`` of a
page,

* scores: ``q . k_t = (q * s_K) . code_t + q . o_K`` (CalibQuant, Eq. 6),
* output: ``sum_t p_t v_t = s_V * sum_t p_t code_t + o_V sum_t p_t`` (Eq. 7),

and the visual scores of a query are calibrated together before one softmax over all tokens (Eq. 8).
This module knows neither vLLM nor Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_calibquant.attention.basis import Basis
from vllm_calibquant.format import PageFormat


class Calibration(NamedTuple):
    """How far the ends of the visual scores of a query move down."""

    tau_min: float
    tau_max: float


LEAST_EXTENT = 2.0**-100
"""What scores must extend over to be told apart: the slope of the map must be a number."""


def calibrate(scores: torch.Tensor, used: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """Map visual scores affinely from ``[a, m]`` to ``[a - tau_min, m - tau_max]``.

    Where ``m - a < tau_max - tau_min`` the map would have a negative slope and reverse the order of
    tokens; the slope is held at 0 there, which gives all of them the score ``a - tau_min``.

    Parameters
    ----------
    scores
        float32 ``[..., n]`` visual scores, each row one query head of one query token.
    used
        bool, broadcastable to ``scores``: which of them count.
    calibration
        The two shifts.

    Returns
    -------
    torch.Tensor
        float32 ``[..., n]``; meaningless where ``used`` is False.
    """
    a = scores.masked_fill(~used, float("inf")).amin(-1, keepdim=True)
    m = scores.masked_fill(~used, float("-inf")).amax(-1, keepdim=True)
    low = a - calibration.tau_min
    extent = m - a
    some = extent > LEAST_EXTENT
    slope = (m - calibration.tau_max - low).clamp(min=0.0) / torch.where(some, extent, 1.0)
    return low + (scores - a) * torch.where(some, slope, 0.0)


class VisualPages(NamedTuple):
    """The visual pages that one request reads."""

    pages: torch.Tensor
    """uint8 ``[P, Hkv, head_bytes]``."""
    used: torch.Tensor
    """bool ``[P, tokens]``, True for the tokens of the request's own sub-slots."""


def mixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visual: VisualPages | None,
    *,
    page_format: PageFormat,
    scale: float,
    calibration: Calibration | None,
    basis: Basis | None = None,
) -> torch.Tensor:
    """Attention of the new tokens of one request.

    Parameters
    ----------
    query
        ``[T, Hq, D]``, the new tokens.
    key, value
        ``[n + T, Hkv, D]`` at full precision: ``n`` cached text tokens that every query sees, then
        the new tokens, causal among themselves.
    visual
        Cached visual pages, which every query sees.
    page_format
        Layout of the pages.
    scale
        Factor of the scores, ``1 / sqrt(D)`` as a rule.
    calibration
        Calibration of the visual scores, or None.
    basis
        Basis in which the pages hold keys and values, or None if they hold them as they are.

    Returns
    -------
    torch.Tensor
        float32 ``[T, Hq, D]``.
    """
    t, hq, _ = query.shape
    hkv = key.shape[1]
    q = query.float().unflatten(1, (hkv, hq // hkv))  # [T, Hkv, G, D]
    k, v = key.float(), value.float()
    n = k.shape[0] - t

    scores = torch.einsum("thgd,nhd->hgtn", q, k) * scale
    future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    scores[..., n:].masked_fill_(future, float("-inf"))
    if visual is None:
        p = scores.softmax(-1)
        return torch.einsum("hgtn,nhd->thgd", p, v).flatten(1, 2)

    key_codes, value_codes, ranges = page_format.unpack(visual.pages)
    k_scale, k_offset, v_scale, v_offset = ranges.float().unbind(-2)  # [P, Hkv, D] each
    bias = torch.zeros(())
    if basis is not None:
        turned, shift = basis.query(query.float())
        q, bias = turned.unflatten(1, (hkv, -1)), shift.T.unflatten(0, (hkv, -1))[..., None, None]
    x = torch.einsum("thgd,phd,phnd->hgtpn", q, k_scale, key_codes.float())
    x = (x + torch.einsum("thgd,phd->hgtp", q, k_offset)[..., None] + bias) * scale
    x, used = x.flatten(-2), visual.used.flatten()  # [Hkv, G, T, P * tokens]
    if calibration is not None:
        x = calibrate(x, used, calibration)
    x = x.masked_fill(~used, float("-inf"))

    p = torch.cat([scores, x], -1).softmax(-1)
    out = torch.einsum("hgtn,nhd->thgd", p[..., : n + t], v)
    p = p[..., n + t :].unflatten(-1, visual.used.shape)
    seen = torch.einsum("hgtpn,phnd,phd->thgd", p, value_codes.float(), v_scale)
    seen += torch.einsum("hgtp,phd->thgd", p.sum(-1), v_offset)
    if basis is not None:
        share = p.sum((-2, -1)).permute(2, 0, 1)[..., None]  # [T, Hkv, G, 1]
        whole = basis.output((seen / share.clamp(min=1e-30)).flatten(1, 2))
        seen = share * whole.unflatten(1, (hkv, -1))
    return (out + seen).flatten(1, 2)
