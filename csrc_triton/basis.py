"""A profile's basis on keys and values, on queries, and on outputs, one launch each.

``K = T^-1 y + mean`` moves to the query, and ``V = T^-1 y + mean`` to the output
(:mod:`vllm_calibquant.attention.basis`, whose ``PartBasis.encode``, ``Basis.query`` and
``Basis.output`` are the twins)::

    y = T (x - mean)    for K and V of visual tokens
    turned = T_K^-T q,    shift = q . mean_K
    visual = T_V^-1 codes + mean_V,    lse = lse_codes + scale shift

The kernel for queries also spreads them over the planes of K, which is what the kernel for
components of any width reads (:mod:`csrc_triton.profile_gluon`); :func:`spread_query` does that for
queries that come without a launch of it.

The kernel for outputs also merges the visual part with the text part.  A program of these two has
16 or 64 rows, pairs of token and query head of one KV head, and 32 of their channels.  With ``PDL``
the next launch need not wait for the first one's end, and the second one begins before the launch
before it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import launch
from .merge import add_parts, begin_merge, end_merge
from .metadata import PAGE_MASK
from .tables import DeviceFormat, cdiv, next_power_of_2, serves_planes, serves_uniform

ROWS, COLUMNS = 16, 32

MANY_TOKENS, MANY_ROWS = 128, 64
"""Tokens from which a program has more rows: the products read their matrices less often."""

ENCODED_ROWS, ENCODED_COLUMNS = 64, 64

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class _PartBasis(Protocol):
    """A ``vllm_calibquant.attention.basis.PartBasis``."""

    @property
    def forward(self) -> torch.Tensor:
        """``[Hkv, D, D]`` in the model's dtype: transposed basis."""

    @property
    def shift(self) -> torch.Tensor:
        """``[Hkv, 1, D]`` in the model's dtype: the mean in the basis."""

    @property
    def inverse(self) -> torch.Tensor:
        """float32 ``[Hkv, D, D]``: transposed inverse of the basis."""

    @property
    def mean(self) -> torch.Tensor:
        """float32 ``[Hkv, D]``."""


class _Basis(Protocol):
    """A ``vllm_calibquant.attention.basis.Basis``."""

    @property
    def key(self) -> _PartBasis:
        """Of K."""

    @property
    def value(self) -> _PartBasis:
        """Of V."""


@dataclass(frozen=True, eq=False)
class Turns:
    """What the basis of a layer takes back of K and of V."""

    key: torch.Tensor
    """float32 ``[Hkv, D + P, D]``: transposed inverse, and for each of P planes its component's row
    times ``DeviceFormat.key_weights``; P is 0 where no kernel reads queries of planes."""
    key_mean: torch.Tensor
    """float32 ``[Hkv, D]``."""
    value: torch.Tensor
    """float32 ``[Hkv, D, D]``: transposed inverse."""
    value_mean: torch.Tensor
    """float32 ``[Hkv, D]``."""

    @classmethod
    def of(cls, basis: _Basis, fmt: DeviceFormat) -> Turns:
        """Of a basis on the format's device."""
        key = basis.key.inverse
        if serves_planes(fmt) and not serves_uniform(fmt):
            planes = key[:, fmt.key_source[0]] * fmt.key_weights.float()[:, None]
            key = torch.cat([key, planes], 1)
        return cls(key, basis.key.mean, basis.value.inverse, basis.value.mean)

    @property
    def num_planes(self) -> int:
        """P."""
        return self.key.shape[1] - self.key.shape[2]


@triton.jit(do_not_specialize=["num_tokens"])
def _encode_kernel(
    p_key, stride_kt, stride_kh, p_value, stride_vt, stride_vh, p_slot_mapping,
    p_key_forward, p_key_shift, p_value_forward, p_value_shift, p_key_out, p_value_out, num_tokens,
    NUM_HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program has BM rows of one KV head and BN channels of K or of V."""
    i_head = tl.program_id(1)
    tiles: tl.constexpr = (D + BN - 1) // BN
    i_tile = tl.program_id(2)
    p_x, stride_t, stride_h = p_key, stride_kt, stride_kh
    p_forward, p_shift, p_out = p_key_forward, p_key_shift, p_key_out
    if i_tile >= tiles:
        i_tile -= tiles
        p_x, stride_t, stride_h = p_value, stride_vt, stride_vh
        p_forward, p_shift, p_out = p_value_forward, p_value_shift, p_value_out
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < num_tokens
    o_d = tl.arange(0, BD)
    o_n = i_tile * BN + tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < D
    slot = tl.load(p_slot_mapping + o_m, mask=m_m, other=-1)
    coded = (slot >= 0) & ((slot >> 4) > PAGE_MASK)
    o_m = o_m.to(tl.int64)
    p_row = p_x + o_m * stride_t + i_head * stride_h
    m = m_m[:, None] & m_n[None, :]
    out = tl.load(p_row[:, None] + o_n[None, :], mask=m, other=0)
    if tl.max(coded.to(tl.int32), 0) > 0:
        x = tl.load(p_row[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0)
        at = (i_head * D + o_d[:, None]) * D + o_n[None, :]
        forward = tl.load(p_forward + at, mask=m_d[:, None] & m_n[None, :], other=0)
        shift = tl.load(p_shift + i_head * D + o_n, mask=m_n, other=0).to(tl.float32)
        if _INTERPRETED:  # it multiplies bfloat16 bit patterns as integers
            x, forward = x.to(tl.float32), forward.to(tl.float32)
        y = tl.dot(x, forward) - shift[None, :]
        out = tl.where(coded[:, None], y.to(out.dtype), out)
    tl.store(p_out + ((o_m * NUM_HEADS + i_head) * D)[:, None] + o_n[None, :], out, mask=m)


@triton.jit
def _rows(num_tokens, GROUP: tl.constexpr, BM: tl.constexpr):
    """Token and query head of each row of a program, and which exist; the others read the last."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    token = o_m // GROUP
    i_head = tl.program_id(1) * GROUP + o_m % GROUP
    return tl.minimum(token, num_tokens - 1).to(tl.int64), i_head, token < num_tokens


@triton.jit(do_not_specialize=["stride_sh", "num_tokens"])
def _turn_query_kernel(
    p_q, stride_qt, stride_qh, p_inverse, p_mean, p_turned, stride_tt, stride_th,
    p_shift, stride_sh, p_spread, num_tokens,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NUM_HEADS: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs have channels, or of the PLANES behind them."""
    tl.static_assert(PLANES == 0 or D % BN == 0)
    if PDL:
        gdc_launch_dependents()  # the next launch waits for this one's results itself
    token, i_head, m_r = _rows(num_tokens, GROUP, BM)
    o_d = tl.arange(0, BD)
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < D + PLANES
    p_row = p_q + token * stride_qt + i_head * stride_qh
    q = tl.load(p_row[:, None] + o_d[None, :], mask=m_d[None, :], other=0)
    q = q.to(tl.float32)
    p_part = p_inverse + tl.program_id(1) * ((D + PLANES) * D)
    m = m_d[:, None] & m_n[None, :]
    inverse = tl.load(p_part + o_n[None, :] * D + o_d[:, None], mask=m, other=0)  # transposed
    turned = tl.dot(q, inverse)
    m = m_r[:, None] & m_n[None, :]
    if tl.program_id(2) * BN < D:
        p_out = p_turned + token * stride_tt + i_head * stride_th
        tl.store(p_out[:, None] + o_n[None, :], turned.to(p_turned.dtype.element_ty), mask=m)
    else:
        p_planes = p_spread + (token * NUM_HEADS + i_head) * PLANES
        tl.store(p_planes[:, None] + (o_n - D)[None, :], turned.to(tl.bfloat16), mask=m)
    if tl.program_id(2) == 0:
        mean = tl.load(p_mean + tl.program_id(1) * D + o_d, mask=m_d, other=0)
        tl.store(p_shift + i_head * stride_sh + token, tl.sum(q * mean[None, :], 1), mask=m_r)


# Log-sum-exps may begin at any row of a batch.
@triton.jit(
    do_not_specialize=["stride_ll", "stride_sh", "stride_tl", "stride_el", "num_tokens"],
    do_not_specialize_on_alignment=["p_lse", "p_shift", "p_text_lse", "p_out_lse"],
)
def _merge_turned_kernel(
    p_codes, stride_ct, stride_ch, p_lse, stride_ll, p_shift, stride_sh, scale,
    p_inverse, p_mean, p_text, stride_tt, stride_th, p_text_lse, stride_tl,
    p_out, stride_ot, stride_oh, p_out_lse, stride_el, num_tokens,
    GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TEXT: tl.constexpr, HAS_LSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, i_head, m_r = _rows(num_tokens, GROUP, BM)
    o_d = tl.arange(0, BD)
    o_n = tl.program_id(2) * BN + tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < D
    p_part = p_inverse + tl.program_id(1) * (D * D)
    m = m_d[:, None] & m_n[None, :]
    inverse = tl.load(p_part + o_d[:, None] * D + o_n[None, :], mask=m, other=0)
    mean = tl.load(p_mean + tl.program_id(1) * D + o_n, mask=m_n, other=0)
    p_row = p_text + token * stride_tt + i_head * stride_th
    top, total, out, wide = begin_merge(
        p_text_lse + i_head * stride_tl + token, p_row[:, None] + o_n[None, :], m_n[None, :],
        HAS_TEXT, BN,
    )  # fmt: skip
    if PDL:
        gdc_wait()  # only now are the codes' part and the queries' shifts complete
    p_row = p_codes + token * stride_ct + i_head * stride_ch
    codes = tl.load(p_row[:, None] + o_d[None, :], mask=m_d[None, :], other=0)
    visual = tl.dot(codes, inverse) + mean[None, :]
    lse = tl.load(p_lse + i_head * stride_ll + token)
    lse += scale * tl.load(p_shift + i_head * stride_sh + token)
    top, total, out, wide = add_parts(top, total, out, wide, lse[None, :], visual[None, :, :])
    out, lse = end_merge(top, total, out, wide, (), o_n, 0)
    p_row = p_out + token * stride_ot + i_head * stride_oh
    m = m_r[:, None] & m_n[None, :]
    tl.store(p_row[:, None] + o_n[None, :], out.to(p_out.dtype.element_ty), mask=m)
    if HAS_LSE:  # the same from all programs of a row
        tl.store(p_out_lse + i_head * stride_el + token, lse, mask=m_r)


def encode(
    key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor, basis: _Basis
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as :func:`csrc_triton.store` codes them: those of visual tokens in the basis.

    Parameters
    ----------
    key, value
        ``[num_tokens, Hkv, D]`` of one dtype, that of the basis.
    slot_mapping
        int64 ``[num_tokens]``: slots, from which it is seen which tokens are visual.
    basis
        Of the layer.

    Returns
    -------
    tuple
        ``[num_tokens, Hkv, D]`` each, contiguous; rows of text are copied.
    """
    num_tokens, heads, d = key.shape
    new_key, new_value = torch.empty(2, *key.shape, dtype=key.dtype, device=key.device)
    if num_tokens > 0:
        columns = min(ENCODED_COLUMNS, next_power_of_2(d))
        launch(
            _encode_kernel, (cdiv(num_tokens, ENCODED_ROWS), heads, 2 * cdiv(d, columns)),
            key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1),
            slot_mapping, basis.key.forward, basis.key.shift, basis.value.forward,
            basis.value.shift, new_key, new_value, num_tokens,
            NUM_HEADS=heads, D=d, BD=next_power_of_2(d), BM=ENCODED_ROWS, BN=columns, num_warps=4,
        )  # fmt: skip
    return new_key, new_value


def _grid_and_constants(
    num_tokens: int, num_heads: int, turns: Turns, planes: int = 0
) -> tuple[tuple[int, ...], dict[str, int]]:
    """Grid for all channels and some planes, and constants, of queries' and outputs' kernels."""
    num_kv_heads, d = turns.key_mean.shape
    group = num_heads // num_kv_heads
    rows, warps = (ROWS, 2) if num_tokens < MANY_TOKENS else (MANY_ROWS, 4)
    grid = (cdiv(num_tokens * group, rows), num_kv_heads, cdiv(d + planes, COLUMNS))
    return grid, {"GROUP": group, "D": d, "BD": next_power_of_2(d), "BM": rows, "BN": COLUMNS,
                  "num_warps": warps}  # fmt: skip


def turn_query(
    query: torch.Tensor, turns: Turns, *, pdl: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries for coded keys.

    Parameters
    ----------
    query
        ``[num_tokens, Hq, D]``; query heads of a KV head are neighbours.
    turns
        Of the layer's basis.
    pdl
        Whether the next launch may begin at once; then it must wait for this one itself.

    Returns
    -------
    turned : torch.Tensor
        ``[num_tokens, Hq, D]`` in the query's dtype: ``T_K^-T q``.
    shift : torch.Tensor
        float32 ``[Hq, num_tokens]``: ``q . mean_K``, what every visual score lacks before scaling.
    spread : torch.Tensor
        bfloat16 ``[num_tokens, Hq, P]``: ``turned`` as :func:`spread_query` spreads it.
    """
    num_tokens, num_heads, _ = query.shape
    num_planes = turns.num_planes
    turned = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shift = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    spread = query.new_empty((num_tokens, num_heads, num_planes), dtype=torch.bfloat16)
    if num_tokens > 0:
        grid, constants = _grid_and_constants(num_tokens, num_heads, turns, num_planes)
        launch(
            _turn_query_kernel, grid,
            query, query.stride(0), query.stride(1), turns.key, turns.key_mean,
            turned, turned.stride(0), turned.stride(1), shift, shift.stride(0),
            spread, num_tokens,
            **constants, NUM_HEADS=num_heads, PLANES=num_planes, PDL=pdl,
        )  # fmt: skip
    return turned, shift, spread


def spread_query(query: torch.Tensor, fmt: DeviceFormat) -> torch.Tensor:
    """The query of every plane of K.

    Parameters
    ----------
    query
        ``[num_tokens, Hq, D]``.
    fmt
        Page format.

    Returns
    -------
    torch.Tensor
        bfloat16 ``[num_tokens, Hq, P]``: that of its component times ``fmt.key_weights``, which are
        powers of two.
    """
    return query.bfloat16().index_select(-1, fmt.key_source[0]) * fmt.key_weights


def merge_turned(
    out: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor],
    shift: torch.Tensor,
    turns: Turns,
    text: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float,
    lse: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Turn what was summed of coded values, and merge it with the text part.

    Parameters
    ----------
    out
        ``[num_tokens, Hq, D]``, written.
    codes
        Attention over coded keys and values, float32 ``[num_tokens, Hq, D]``, and its log-sum-exp,
        float32 ``[Hq, num_tokens]``, -inf without visual tokens.
    shift
        Of :func:`turn_query`.
    turns
        Of the layer's basis.
    text
        Output and log-sum-exp of the text part, which is -inf or +inf without keys, or None.
    scale
        Factor on scores.
    lse
        float32 ``[Hq, num_tokens]``, written if given: the log-sum-exp of everything in ``out``.
    pdl
        Whether to begin before the launch before this one, which must be that of ``codes``, has
        ended.
    """
    num_tokens, num_heads, _ = out.shape
    if num_tokens == 0:
        return
    x, x_lse = codes
    text_out, text_lse = text or codes
    out_lse = x_lse if lse is None else lse
    grid, constants = _grid_and_constants(num_tokens, num_heads, turns)
    launch(
        _merge_turned_kernel, grid,
        x, x.stride(0), x.stride(1), x_lse, x_lse.stride(0), shift, shift.stride(0), scale,
        turns.value, turns.value_mean, text_out, text_out.stride(0), text_out.stride(1),
        text_lse, text_lse.stride(0), out, out.stride(0), out.stride(1),
        out_lse, out_lse.stride(0), num_tokens,
        **constants, HAS_TEXT=text is not None, HAS_LSE=lse is not None, PDL=pdl,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
