"""Prefill over visual pages in Gluon: the products of :mod:`csrc_triton.fragments`, many rows.

A program is one warp with 16 rows, pairs of query token and head of one KV head, as columns of the
products; it reads a share of its request's runs.  What is unpacked for one column serves sixteen.
K and V of the next page come into a ring in shared memory while a page is used.  A page is taken in
groups of 4 sub-slots; probabilities are relative to a score near the largest so far, which seldom
moves; and the output is one accumulator in units of the page's V scale::

    out = s_V * acc,    acc <- acc * s_V(page before) / s_V(page) + codes . p + (lo_V / s_V) sum p

A channel of scale 0 has codes 0; its unit is a small number.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .fragments import (
    LEAST_SUM,
    LOG2E,
    PAGE_MASK,
    SCORE_UNIT,
    TAG,
    bit,
    calibration,
    exponent,
    fetch,
    flushed_exp2,
    flushed_probabilities,
    fold_max,
    fold_min,
    fold_sum,
    group_first,
    group_scores,
    group_size,
    inside,
    last_block_bias,
    load_group,
    multiply,
    num_groups,
    offset_scores,
    pow2,
    query_weight,
    value_operand,
)
from .gluon_compat import reinterpret

ROWS = 16
"""Rows of a program."""

_N = gl.constexpr(ROWS)
_SLACK = gl.constexpr(8.0)
"""Power of two by which a score may exceed the one that probabilities are relative to."""

_P_EXP = gl.constexpr(60)
_P_UNIT = gl.constexpr(2.0**-60)
"""Scale of P: keeps products with the powers of codes normal and ``lo_V / s_V`` within float32."""

_LEAST = gl.constexpr(2.0**-20)
"""Unit of a channel of scale 0: small, because rounded probabilities leave a rest of their sum."""


# One compilation for all steps: what changes from step to step is not specialised.
@gluon.jit(do_not_specialize=["first_req", "stride_ls", "stride_lh", "splits"])
def _prefill_kernel(
    p_q, stride_qt, stride_qh, p_words, p_cache, stride_page, stride_head,
    p_runs, stride_runs, p_num_runs, p_query_start, first_req,
    p_out, stride_os, stride_ot, stride_oh, p_lse, stride_ls, stride_lh, p_low, p_high,
    scale, tau_min, tau_max, splits,
    GROUP: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr,
    RANGE_OFFSET: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)  # channels or tokens of an accumulator
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)  # queries
    SIGNED: gl.constexpr = D == 128  # plane block 15 exists
    LEVELS: gl.constexpr = (1 << BITS) - 1

    i_head = gl.program_id(1)
    req = first_req + gl.program_id(2) // splits
    i_split = (gl.program_id(2) % splits).to(gl.int64)
    begin = gl.load(p_query_start + req)
    num_rows = (gl.load(p_query_start + req + 1) - begin) * GROUP
    first_row = gl.program_id(0) * _N
    if first_row >= num_rows:
        return
    num_runs = gl.load(p_num_runs + req)
    run_begin = (num_runs * i_split // splits).to(gl.int32)
    run_end = (num_runs * (i_split + 1) // splits).to(gl.int32)
    p_run = p_runs + req.to(gl.int64) * stride_runs

    o_k = gl.arange(0, D, gl.SliceLayout(1, B))
    o_n = first_row + gl.arange(0, _N, gl.SliceLayout(0, B))
    p_qi = p_q + (begin + o_n // GROUP).to(gl.int64) * stride_qt
    p_qi += (i_head * GROUP + o_n % GROUP) * stride_qh
    m_n = (o_n < num_rows)[None, :]
    exact = gl.load(p_qi[None, :] + o_k[:, None], mask=m_n, other=0.0)
    exact = exact.to(p_cache.dtype.element_ty)
    q = exact.to(gl.bfloat16)
    weight = query_weight(o_k).to(gl.bfloat16)[:, None]

    o_c = first_row + gl.arange(0, _N, COLUMN)
    m_c = o_c < num_rows
    o_token = (begin + o_c // GROUP).to(gl.int64)
    o_h = i_head * GROUP + o_c % GROUP
    o_d = gl.arange(0, D, ROW)
    last_block = o_d // 8 == 15
    at_lse = o_h * stride_lh + o_token
    unit = scale * LOG2E * 1073741824.0  # 2**SCORE_EXP: accumulators to log2 of a probability
    factor = gl.zeros([_N], gl.float32, COLUMN) + unit
    shift = gl.zeros([_N], gl.float32, COLUMN)
    low = gl.full([_N], float("inf"), gl.float32, COLUMN)
    high = gl.full([_N], float("-inf"), gl.float32, COLUMN)
    if MODE == 2:
        for i_other in range(splits):
            at = i_other * stride_ls + at_lse
            low = gl.minimum(low, gl.load(p_low + at, mask=m_c, other=0.0))
            high = gl.maximum(high, gl.load(p_high + at, mask=m_c, other=0.0))
        slope, calibrated = calibration(low, high, tau_min, tau_max)
        factor = factor * slope
        shift = _P_EXP - high * slope * LOG2E
    m_i = gl.full([_N], -1e30, gl.float32, COLUMN)
    l_i = gl.zeros([_N], gl.float32, COLUMN)
    acc = gl.zeros([D, _N], gl.float32, MMA)
    units = gl.full([D], 1.0, gl.float32, ROW)  # V scale that acc is counted in

    CODES: gl.constexpr = SLOTS * (BITS * D // 2)  # words of the K codes
    RANGES: gl.constexpr = RANGE_OFFSET // 2
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(gl.int32, [4, 8 * D], flat)
    numbers = reinterpret(ring, p_cache.dtype.element_ty, [4, 16 * D], flat)
    earliest = gl.maximum(gl.minimum(run_begin, run_end - 1), 0)  # a share may be empty
    first = gl.load(p_run + earliest * 2)
    last_slot = gl.load(p_run + earliest * 2 + 1)
    base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
    stage = 0
    if run_begin < run_end:
        fetch(ring.index(0), p_words + base // 2, 0, D, CODES, RANGES)
        if MODE != 1:
            fetch(ring.index(1), p_words + base // 2, 1, D, CODES, RANGES)
    async_copy.commit_group()
    for i_run in range(run_begin, run_end):
        end_slot = last_slot + 1
        first_slot = (first >> TAG) - 1
        whole = (first_slot == 0) & (end_slot == SLOTS)
        if i_run + 1 < run_end:
            first = gl.load(p_run + i_run * 2 + 2)
            last_slot = gl.load(p_run + i_run * 2 + 3)
            base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
            fetch(ring.index(2 - stage), p_words + base // 2, 0, D, CODES, RANGES)
            if MODE != 1:
                fetch(ring.index(3 - stage), p_words + base // 2, 1, D, CODES, RANGES)
        async_copy.commit_group()
        async_copy.wait_group(1)
        keys = ring.index(stage)
        ranges = numbers.index(stage)
        k_scale = ranges.slice(2 * CODES, D).load(gl.SliceLayout(1, B)).to(gl.bfloat16)
        k_low = ranges.slice(2 * CODES + D, D).load(gl.SliceLayout(0, A))
        bias = offset_scores(exact, k_low, MMA, A) * SCORE_UNIT
        qs = multiply(multiply(q, weight), k_scale[:, None])
        if SIGNED:
            bias = last_block_bias(qs, bias, LEVELS, A, B)
        if MODE != 1:
            values = ring.index(stage + 1)
            ranges = numbers.index(stage + 1)
            v_scale = ranges.slice(2 * CODES, D).load(ROW).to(gl.float32)
            v_scale = gl.where(v_scale > 0, v_scale, _LEAST)
            v_low = ranges.slice(2 * CODES + D, D).load(ROW).to(gl.float32)
            acc = acc * (units / v_scale)[:, None]
            units = v_scale
            total = gl.zeros([16, _N], gl.float32, MMA)
        for g in gl.static_range(num_groups(SLOTS, SLOTS, 0)):
            s = group_scores(
                load_group(
                    keys, D, BITS, group_first(SLOTS, SLOTS, 0, g), group_size(SLOTS, SLOTS, 0, g)
                ),
                qs, bias, group_size(SLOTS, SLOTS, 0, g), BITS, MMA, A, D,
            )  # fmt: skip
            s_low = s
            if not whole:
                used = inside(
                    group_first(SLOTS, SLOTS, 0, g), group_size(SLOTS, SLOTS, 0, g), first_slot,
                    end_slot, MMA,
                )  # fmt: skip
                s = gl.where(used, s, float("-inf"))
                if MODE == 1:
                    s_low = gl.where(used, s_low, float("inf"))
            if MODE == 1:
                high = gl.maximum(high, gl.max(fold_max(s, MMA), 0))
                low = gl.minimum(low, gl.min(fold_min(s_low, MMA), 0))
            else:
                if MODE == 0:
                    top = gl.max(fold_max(s, MMA), 0) * unit
                    if gl.max(top - m_i, 0) > _SLACK:
                        m_new = gl.maximum(m_i, top)
                        alpha = flushed_exp2(m_i - m_new)
                        m_i = m_new
                        acc = acc * alpha[None, :]
                        total = total * alpha[None, :]
                        l_i = l_i * alpha
                    shift = _P_EXP - m_i
                p, b = flushed_probabilities(s, factor, shift, B)
                total += fold_sum(p, MMA)
                words = load_group(
                    values, D, BITS, group_first(SLOTS, SLOTS, 0, g), group_size(SLOTS, SLOTS, 0, g)
                )
                for i_bit in gl.static_range(BITS):
                    if i_bit > 0:
                        b = multiply(b, gl.full(b.shape, 2.0, gl.bfloat16, B))
                    acc = mma_v2(value_operand(bit(words, i_bit), A, D), b, acc)
        if MODE != 1:
            page_total = gl.sum(total, 0) * _P_UNIT
            l_i += page_total
            v_low = v_low / v_scale * pow2(exponent(o_d // 8) + _P_EXP)
            if SIGNED:  # bit 15 reads as 1 or -1: a code bit is half of 1 minus that
                v_low = gl.where(last_block, -2.0 * v_low - LEVELS * pow2(0 * o_d + _P_EXP), v_low)
            acc += v_low[:, None] * page_total[None, :]
        stage = 2 - stage

    at_lse = i_split * stride_ls + at_lse
    if MODE == 1:
        gl.store(p_low + at_lse, low * (scale * 1073741824.0), mask=m_c)
        gl.store(p_high + at_lse, high * (scale * 1073741824.0), mask=m_c)
    else:
        some = l_i > LEAST_SUM
        safe = gl.where(some, l_i, 1.0)
        if MODE == 2:
            lse = calibrated + gl.log(safe)
        else:
            lse = m_i / LOG2E + gl.log(safe)
        gl.store(p_lse + at_lse, gl.where(some, lse, float("-inf")), mask=m_c)
        units = units * pow2(-exponent(o_d // 8) - _P_EXP) * gl.where(last_block, -0.5, 1.0)
        acc = acc * units[:, None] / safe[None, :]
        p_row = p_out + i_split * stride_os + o_token * stride_ot + o_h * stride_oh
        out = acc.to(p_out.dtype.element_ty)
        gl.store(p_row[None, :] + o_d[:, None], out, mask=m_c[None, :])
