"""Attention over cached visual pages in plain Triton: every format, decode and prefill.

One kernel serves decode (rows are the query heads of one KV head, work is split over items of runs)
and prefill (rows are pairs of query token and head; a program reads one of ``splits`` shares of the
runs of its request).
It needs neither Gluon nor Hopper.  The decode fast path is in :mod:`csrc_triton.decode_gluon`.

For a run of sub-slots of one page, with the page's scale and offset (method.md, post-scaling)::

    x_t  = (q * s_K) . code_t + q . lo_K
    out += s_V * sum_t p_t code_t + lo_V * sum_t p_t

so codes are unpacked in registers as small integers, and no dequantised key or value ever exists.

Calibration needs the smallest and largest score a, m of each row over the whole request first.
With them it is one multiply-add a score, ``x' = x * slope + (a - tau_min - a * slope)``.  The
slope is held at 0 or more: a range smaller than the shift would otherwise reverse the order of the
tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_calibquant.attention.reference import LEAST_EXTENT

from .metadata import PAGE_MASK, TAG

_LEAST_EXTENT = tl.constexpr(LEAST_EXTENT)

DOT_DTYPE = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
"""Dtype of the operands of a dot; the interpreter multiplies bfloat16 bit patterns as integers."""

ATTEND = 0
"""Mode: softmax over the scores as they are."""
EXTREMES = 1
"""Mode: smallest and largest score of each row."""
CALIBRATE = 2
"""Mode: softmax over the calibrated scores, whose extremes are read."""


@triton.jit
def _tile(slot, size, SLOTS: tl.constexpr):
    """First sub-slot of the tile of a sub-slot, in a section of ``size`` planes, and how many."""
    full = tl.where(size >= 256, 1, tl.where(size == 128, 2, 4))
    first = slot // full * full
    count = tl.minimum(full, SLOTS - first)
    if SLOTS % 4 == 3:  # three sub-slots are a tile of two and one of one
        last = (count == 3) & (slot - first == 2)
        count = tl.where(count == 3, tl.where(last, 1, 2), count)
        first = tl.where(last, slot, first)
    return first, count


@triton.jit
def _whole_codes(
    p_words, start, token_end, D: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """:func:`_codes` for 64 or 128 channels of equal width: a load for a word, not for a code."""
    BLOCKS: tl.constexpr = D // 8
    UNITS: tl.constexpr = 16 // BLOCKS  # (token group, bit) pairs in a word
    group = start // 8 + tl.arange(0, BT // 8)
    m_group = group * 8 < token_end
    first, count = _tile(group // 2, D * BITS, SLOTS)
    lane_words = count * (BITS * D) // 64
    base = first * (BITS * D // 2)
    if TRANSPOSED:
        lane = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, 8)[None, :]
        o_half = tl.reshape(tl.arange(0, 2), [1, 1, 2, 1, 1])
        o_block = tl.reshape(tl.arange(0, BLOCKS), [1, 1, 1, BLOCKS, 1])
    else:
        lane = 4 * tl.arange(0, 8)[:, None] + tl.arange(0, 4)[None, :]
        o_half = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2])
        o_block = tl.reshape(tl.arange(0, BLOCKS), [1, 1, BLOCKS, 1, 1])
    codes = tl.zeros([BT, D], tl.int32)
    for b in tl.static_range(BITS):
        unit = (group - first * 2) * BITS + b
        at = (base + unit // UNITS)[:, None, None] + lane[None, :, :] * lane_words[:, None, None]
        w = tl.load(p_words + at, mask=m_group[:, None, None], other=0)
        w = w >> ((unit % UNITS) * BLOCKS)[:, None, None]
        if TRANSPOSED:
            w = tl.reshape(w, [BT // 8, 4, 1, 1, 8])
        else:
            w = tl.reshape(w, [BT // 8, 8, 1, 4, 1])
        codes |= tl.reshape((w >> (o_block + 16 * o_half)) & 1, [BT, D]) << b
    return codes


@triton.jit
def _codes(
    p_words, p_plane, start, token_end, o_d,
    D: tl.constexpr, MAX_BITS: tl.constexpr, PLANES: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Integer codes ``[BT, BD]`` of the tokens from ``start`` on (the order is in format.py)."""
    if WHOLE:
        codes = _whole_codes(p_words, start, token_end, D, MAX_BITS, SLOTS, TRANSPOSED, BT)
    else:
        o_token = start + tl.arange(0, BT)
        slot = (o_token // 16)[:, None]
        codes = tl.zeros([BT, o_d.shape[0]], tl.int32)
        for b in tl.static_range(MAX_BITS):
            plane = tl.load(p_plane + b * D + o_d, mask=o_d < D, other=-1)
            m = (o_token < token_end)[:, None] & (plane >= 0)[None, :]
            # The section of a plane is the highest bit that the number of planes has and it lacks.
            size = tl.full(plane.shape, 32, tl.int32)
            for i in tl.static_range(6, 12):
                if (PLANES >> i) & 1:
                    size = tl.where((PLANES & ~plane) >> i > 0, 1 << i, size)
            section = (PLANES & -(2 * size))[None, :]
            plane = plane[None, :] - section
            size = size[None, :]
            first, count = _tile(slot, size, SLOTS)
            if TRANSPOSED:
                row = plane % 8
                column = (o_token % 8)[:, None]
            else:
                row = (o_token % 8)[:, None]
                column = plane % 8
            pair = ((o_token // 8)[:, None] - first * 2) * (size // 8) + plane // 8
            word = (section * SLOTS + first * size) // 2 + pair // 16
            word += (row * 4 + column // 2) * (count * size // 64)
            w = tl.load(p_words + word, mask=m, other=0)
            codes |= ((w >> ((column % 2) * 16 + pair % 16)) & 1) << b
    return codes


@triton.jit
def _page_query(q, p_range, o_d, m_d, D: tl.constexpr, DOT: tl.constexpr):
    """Rows q ``[rows, BD]`` times a page's K scale, and their products with its K offset."""
    scale = tl.load(p_range + o_d, mask=m_d, other=0).to(tl.float32)
    offset = tl.load(p_range + D + o_d, mask=m_d, other=0).to(tl.float32)
    return (q * scale[None, :]).to(DOT), tl.sum(q * offset[None, :], 1)


@triton.jit
def _scores(
    qs, bias, p_page, p_plane, start, token_end, o_d,
    D: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, SLOTS: tl.constexpr,
    DOT: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores ``[rows, tokens]`` against a page's keys (1/sqrt(D) is in the query)."""
    codes = _codes(p_page, p_plane, start, token_end, o_d, D, BITS, PLANES, SLOTS, False, BT, WHOLE)
    return tl.dot(qs, tl.trans(codes.to(tl.float32).to(DOT))) + bias[:, None]


@triton.jit
def _run_tokens(p_req_runs, i_run, begin, end, HALF: tl.constexpr):
    """Tagged id of a run's first sub-slot, and its tokens in half runs begin .. end - 1."""
    first = tl.load(p_req_runs + i_run * 2)
    token_begin = ((first >> TAG) - 1) * 16
    token_end = (tl.load(p_req_runs + i_run * 2 + 1) + 1) * 16
    token_begin = tl.where(i_run * 2 < begin, tl.maximum(token_begin, HALF * 16), token_begin)
    token_end = tl.where(i_run * 2 + 2 > end, tl.minimum(token_end, HALF * 16), token_end)
    return first, token_begin, token_end


@triton.jit(do_not_specialize=["first_req", "stride_lh", "stride_ls", "splits"])
def _attend_kernel(
    p_q, stride_qt, stride_qh, p_words, p_cache, stride_page, stride_head,
    p_runs, stride_runs, p_num_runs, p_query_start, first_req,
    p_items, p_plan, p_item_start,
    p_out, stride_ot, stride_oh, p_lse, stride_lt, stride_lh,
    p_low, p_high, p_key_plane, p_value_plane, scale, tau_min, tau_max,
    stride_os, stride_ls, splits,
    D: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr, SLOTS: tl.constexpr, RANGE_OFFSET: tl.constexpr,
    HALF: tl.constexpr, MODE: tl.constexpr, DECODE: tl.constexpr, DOT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(1)
    o_r = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    m_d = o_d < D
    if DECODE:
        i_item = tl.program_id(0)
        if i_item >= tl.load(p_plan + 4):
            return
        req = tl.load(p_items + 4 * i_item)
        begin = tl.load(p_items + 4 * i_item + 1)
        end = tl.load(p_items + 4 * i_item + 2)
        m_r = o_r < GROUP
        o_q = tl.zeros([BM], tl.int32) + req
        o_h = i_head * GROUP + o_r
        o_o = tl.zeros([BM], tl.int32) + i_item
    else:
        req = first_req + tl.program_id(2) // splits
        i_split = (tl.program_id(2) % splits).to(tl.int64)
        query_begin = tl.load(p_query_start + req)
        rows = (tl.load(p_query_start + req + 1) - query_begin) * GROUP
        o_m = tl.program_id(0) * BM + o_r
        if tl.program_id(0) * BM >= rows:
            return
        m_r = o_m < rows
        o_q = query_begin + o_m // GROUP
        o_h = i_head * GROUP + o_m % GROUP
        o_o = o_q
        num_runs = tl.load(p_num_runs + req)
        begin = 2 * (num_runs * i_split // splits).to(tl.int32)
        end = 2 * (num_runs * (i_split + 1) // splits).to(tl.int32)
        p_out += i_split * stride_os
        p_lse += i_split * stride_ls
    m_rd = m_r[:, None] & m_d[None, :]
    p_q_rows = p_q + o_q.to(tl.int64) * stride_qt + o_h * stride_qh
    q = tl.load(p_q_rows[:, None] + o_d[None, :], mask=m_rd, other=0).to(tl.float32) * scale
    p_req_runs = p_runs + req.to(tl.int64) * stride_runs

    low = tl.full([BM], float("inf"), tl.float32)
    high = tl.full([BM], float("-inf"), tl.float32)
    slope = tl.full([BM], 1.0, tl.float32)
    shift = tl.zeros([BM], tl.float32)
    if MODE == 1:
        for i_run in range(begin // 2, (end + 1) // 2):
            first, token_begin, token_end = _run_tokens(p_req_runs, i_run, begin, end, HALF)
            base = (first & PAGE_MASK).to(tl.int64) * stride_page + i_head * stride_head
            p_range = p_cache + base + RANGE_OFFSET
            qs, bias = _page_query(q, p_range, o_d, m_d, D, DOT)
            for start in range(token_begin, token_end, BT):
                m_token = start + o_t < token_end
                s = _scores(
                    qs, bias, p_words + base // 2, p_key_plane, start, token_end, o_d,
                    D, KEY_BITS, KEY_PLANES, SLOTS, DOT, BT, WHOLE,
                )  # fmt: skip
                low = tl.minimum(low, tl.min(tl.where(m_token[None, :], s, float("inf")), 1))
                high = tl.maximum(high, tl.max(tl.where(m_token[None, :], s, float("-inf")), 1))
    if MODE == 1:
        p_row = o_o.to(tl.int64) * stride_lt + o_h * stride_lh
        if not DECODE:
            p_row += i_split * stride_ls
        tl.store(p_low + p_row, low, mask=m_r)
        tl.store(p_high + p_row, high, mask=m_r)
        return
    if MODE == 2:
        if DECODE:
            for i_other in range(tl.load(p_item_start + req), tl.load(p_item_start + req + 1)):
                p_row = i_other * stride_lt + o_h * stride_lh
                low = tl.minimum(low, tl.load(p_low + p_row, mask=m_r, other=0.0))
                high = tl.maximum(high, tl.load(p_high + p_row, mask=m_r, other=0.0))
        else:
            for i_other in range(splits):
                p_row = o_o.to(tl.int64) * stride_lt + o_h * stride_lh + i_other * stride_ls
                low = tl.minimum(low, tl.load(p_low + p_row, mask=m_r, other=0.0))
                high = tl.maximum(high, tl.load(p_high + p_row, mask=m_r, other=0.0))
        width = high - low
        some = width > _LEAST_EXTENT
        slope = tl.maximum((high - tau_max) - (low - tau_min), 0.0) / tl.where(some, width, 1.0)
        slope = tl.where(some, slope, 0.0)
        shift = low - tau_min - low * slope

    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for i_run in range(begin // 2, (end + 1) // 2):
        first, token_begin, token_end = _run_tokens(p_req_runs, i_run, begin, end, HALF)
        base = (first & PAGE_MASK).to(tl.int64) * stride_page + i_head * stride_head
        p_range = p_cache + base + RANGE_OFFSET
        qs, bias = _page_query(q, p_range, o_d, m_d, D, DOT)
        vs = tl.load(p_range + 2 * D + o_d, mask=m_d, other=0).to(tl.float32)
        vo = tl.load(p_range + 3 * D + o_d, mask=m_d, other=0).to(tl.float32)
        for start in range(token_begin, token_end, BT):
            m_token = start + o_t < token_end
            s = _scores(
                qs, bias, p_words + base // 2, p_key_plane, start, token_end, o_d,
                D, KEY_BITS, KEY_PLANES, SLOTS, DOT, BT, WHOLE,
            )  # fmt: skip
            if MODE == 2:
                s = s * slope[:, None] + shift[:, None]
            s = tl.where(m_token[None, :], s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))
            alpha = tl.exp(m_i - m_new)
            p = tl.exp(s - m_new[:, None])
            l_tile = tl.sum(p, 1)
            codes = _codes(
                p_words + base // 2 + SLOTS * KEY_PLANES // 2, p_value_plane, start, token_end, o_d,
                D, VALUE_BITS, VALUE_PLANES, SLOTS, True, BT, WHOLE,
            )  # fmt: skip
            pv = tl.dot(p.to(DOT), codes.to(tl.float32).to(DOT))
            acc = acc * alpha[:, None] + pv * vs[None, :] + l_tile[:, None] * vo[None, :]
            l_i = l_i * alpha + l_tile
            m_i = m_new

    some = l_i > 0
    out = acc / tl.where(some, l_i, 1.0)[:, None]
    lse = tl.where(some, m_i + tl.log(tl.where(some, l_i, 1.0)), float("-inf"))
    p_row = p_out + o_o.to(tl.int64) * stride_ot + o_h * stride_oh
    tl.store(p_row[:, None] + o_d[None, :], out.to(p_out.dtype.element_ty), mask=m_rd)
    tl.store(p_lse + o_o.to(tl.int64) * stride_lt + o_h * stride_lh, lse, mask=m_r)


def naive_visual_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    calibration: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of the kernels: attention of all rows over all given visual tokens.

    Parameters
    ----------
    query
        ``[rows, Hq, D]``, any float dtype; computed in float64.
    key, value
        ``[tokens, Hkv, D]``, dequantised.
    scale
        Factor on scores, usually ``D ** -0.5``.
    calibration
        ``(tau_min, tau_max)``, or None for scores as they are.

    Returns
    -------
    out : torch.Tensor
        float64 ``[rows, Hq, D]``; 0 without tokens.
    lse : torch.Tensor
        float64 ``[Hq, rows]``, natural logarithm; -inf without tokens.
    """
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    if key.shape[0] == 0:
        lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"))
        return torch.zeros_like(query), lse
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,thd->hqt", query, key) * scale
    if calibration is not None:
        scores = naive_calibrate(scores, *calibration)
    out = torch.einsum("hqt,thd->qhd", scores.softmax(-1), value)
    return out, scores.logsumexp(-1)


def naive_calibrate(scores: torch.Tensor, tau_min: float, tau_max: float) -> torch.Tensor:
    """Calibrated scores ``[..., tokens]`` (CalibQuant, method.md), slope held at 0 or more."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    width = high - low
    slope = ((high - tau_max) - (low - tau_min)).clamp(min=0) / torch.where(width > 0, width, 1)
    return low - tau_min + (scores - low) * torch.where(width > 0, slope, 0)
