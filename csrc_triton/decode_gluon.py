"""Decode attention over visual pages in Gluon: the products of :mod:`csrc_triton.fragments`.

A program is one warp: it owns an item (some runs of one request) and one KV head.  K and V of the
next pages come into a ring in shared memory while a page is used, and a page is taken in parts of
at most 64 scores a lane, so that twelve warps share the registers of a multiprocessor.

The bias q . lo_K of a page is the accumulator that its score products start from: a product with
rows all equal to lo_K, so every row of the result is the bias.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fragments import (
    LOG2E,
    P_EXP,
    PAGE_MASK,
    SCORE_EXP,
    TAG,
    exponent,
    fold_max,
    fold_min,
    fold_sum,
    group_first,
    group_output,
    group_scores,
    group_size,
    inside,
    last_block_bias,
    multiply,
    multiply_again,
    num_groups,
    num_parts,
    part_slots,
    pow2,
    probabilities,
)


@gluon.jit
def _load_tile(page, offset: gl.constexpr, WORDS: gl.constexpr):
    """WORDS words of each lane, consecutive in shared memory: int32 [32, WORDS]."""
    L: gl.constexpr = gl.BlockedLayout([WORDS], [32], [1], [0])
    return page.slice(offset, 32 * WORDS).load(L).reshape([32, WORDS])


@gluon.jit
def _fetch(to, p_page, VALUES: gl.constexpr, D: gl.constexpr, CODES: gl.constexpr,
           RANGES: gl.constexpr):  # fmt: skip
    """Start to copy K (or V) codes and ranges of a page's KV head into 8 D words of the ring."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    o = gl.arange(0, 8 * D, L)
    o = gl.where(o < CODES, VALUES * CODES + o, RANGES + VALUES * D + (o - CODES) % D)
    o = gl.max_contiguous(gl.multiple_of(o, 4), 4)
    async_copy.async_copy_global_to_shared(to, p_page + o)


@gluon.jit
def _load_group(
    page, D: gl.constexpr, BITS: gl.constexpr, FIRST: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """Words of COUNT sub-slots: for each, for each bit, int32 [8 rows, 4 columns, 2 token groups].

    Bit i of a half-word is plane block i.  With 64 channels a word holds two sets of 8 plane blocks
    (two token groups, or two bits): the upper set is shifted down.
    """
    out = ()
    start: gl.constexpr = FIRST * (BITS * D // 2)
    if D == 128 and BITS == 1:
        gl.static_assert(FIRST % 2 == 0 and COUNT % 2 == 0)
        for t in gl.static_range(COUNT // 2):
            w = _load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).permute((0, 1, 3, 2))
            w0, w1 = w.split()
            out = out + ((w0,), (w1,))
    elif D == 128 and BITS == 2:
        for t in gl.static_range(COUNT):
            w0, w1 = _load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).split()
            out = out + ((w0, w1),)
    elif D == 128:
        gl.static_assert(BITS == 4)
        for t in gl.static_range(COUNT):
            even, odd = _load_tile(page, start + t * 256, 8).reshape([8, 4, 2, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = out + ((w0, w1, w2, w3),)
    elif BITS == 1:
        gl.static_assert(D == 64 and FIRST % 4 == 0)
        if COUNT == 4:
            even, odd = _load_tile(page, start, 4).reshape([8, 4, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = out + (
                (gl.join(w0, w0 >> 8),), (gl.join(w1, w1 >> 8),),
                (gl.join(w2, w2 >> 8),), (gl.join(w3, w3 >> 8),),
            )  # fmt: skip
        else:
            gl.static_assert(COUNT == 2)
            w0, w1 = _load_tile(page, start, 2).reshape([8, 4, 2]).split()
            out = out + ((gl.join(w0, w0 >> 8),), (gl.join(w1, w1 >> 8),))
    elif BITS == 2:
        gl.static_assert(FIRST % 2 == 0)
        for t in gl.static_range(COUNT // 2):
            w = _load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).permute((0, 1, 3, 2))
            w0, w1 = w.split()
            out = out + ((w0, w0 >> 8), (w1, w1 >> 8))
        if COUNT % 2 == 1:
            w0 = _load_tile(page, start + (COUNT // 2) * 128, 2).reshape([8, 4, 2])
            out = out + ((w0, w0 >> 8),)
    else:
        gl.static_assert(BITS == 4)
        for t in gl.static_range(COUNT):
            w0, w2 = _load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).split()
            out = out + ((w0, w0 >> 8, w2, w2 >> 8),)
    return out


@gluon.jit
def _load_part(
    page, D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr,
    PART_SLOTS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Words of a part of a page, a tuple for each group."""
    out = ()
    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, PART)):
        out = out + (
            _load_group(
                page,
                D,
                BITS,
                group_first(SLOTS, PART_SLOTS, PART, g),
                group_size(SLOTS, PART_SLOTS, PART, g),
            ),
        )
    return out


@gluon.jit
def _decode_kernel(
    p_q, stride_qt, stride_qh, p_words, p_cache, stride_page, stride_head,
    p_runs, stride_runs, p_item_req, p_item_run, p_item_end, p_plan, p_item_start,
    p_out, p_lse, p_low, p_high, scale, tau_min, tau_max,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    BITS: gl.constexpr, SLOTS: gl.constexpr, RANGE_OFFSET: gl.constexpr, MODE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    PART_SLOTS: gl.constexpr = part_slots(BITS, N)
    PARTS: gl.constexpr = num_parts(SLOTS, BITS, N)
    SIGNED: gl.constexpr = D == 128  # plane block 15 exists
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)  # channels or tokens of an accumulator
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)  # queries

    if PDL:
        gdc_launch_dependents()  # the next launch waits for this one's results itself
    i_head = gl.program_id(0)
    i_item = gl.program_id(1)
    num_items = gl.load(p_plan)
    req = gl.load(p_item_req + i_item)
    run_begin = gl.load(p_item_run + i_item)
    run_end = gl.load(p_item_end + i_item)
    if i_item >= num_items:
        return
    p_run = p_runs + req.to(gl.int64) * stride_runs

    # Queries as a B operand [D, N]: plain for the bias, and with the powers of the code bits.
    o_k = gl.arange(0, D, gl.SliceLayout(1, B))
    o_n = gl.arange(0, N, gl.SliceLayout(0, B))
    p_qi = p_q + req.to(gl.int64) * stride_qt + (i_head * GROUP + o_n[None, :]) * stride_qh
    q = gl.load(p_qi + o_k[:, None], mask=(o_n < GROUP)[None, :], other=0.0).to(gl.float32)
    weight = pow2(-SCORE_EXP - 4 - exponent(o_k // 8)) * 16.0
    weight = gl.where(o_k // 8 == 15, -0.5 * weight, weight)
    q_code = (q * weight[:, None]).to(gl.bfloat16)
    unfold = gl.where(o_k // 8 == 15, 0xC000, 1 << (o_k // 8)).to(gl.int16)
    unfold = unfold.to(gl.bfloat16, bitcast=True)  # what takes the powers out again

    o_c = gl.arange(0, N, COLUMN)
    o_d = gl.arange(0, D, ROW)
    m_c = o_c < GROUP
    o_h = i_head * GROUP + o_c
    unit = scale * LOG2E * 1073741824.0  # 2**SCORE_EXP: accumulators to log2 of a probability
    factor = gl.zeros([N], gl.float32, COLUMN) + unit
    shift = gl.zeros([N], gl.float32, COLUMN)
    if MODE == 2:
        begin = gl.load(p_item_start + req)
        end = gl.load(p_item_start + req + 1)
        o_i = gl.arange(0, 16, ROW)
        low = gl.full([16, N], float("inf"), gl.float32, MMA)
        high = gl.full([16, N], float("-inf"), gl.float32, MMA)
        if PDL:
            gdc_wait()  # for the extremes
        for start in range(begin, end, 16):
            at = (start + o_i)[:, None] * NUM_HEADS + o_h[None, :]
            m = (start + o_i < end)[:, None] & m_c[None, :]
            low = gl.minimum(low, gl.load(p_low + at, mask=m, other=float("inf")))
            high = gl.maximum(high, gl.load(p_high + at, mask=m, other=float("-inf")))
        low = gl.where(m_c, gl.min(low, 0), 0.0)
        high = gl.where(m_c, gl.max(high, 0), 0.0)
        width = high - low
        some = width > 0
        slope = gl.maximum((high - tau_max) - (low - tau_min), 0.0) / gl.where(some, width, 1.0)
        # Not exactly 0: the masked scores are -inf and must stay so.
        slope = gl.maximum(gl.where(some, slope, 0.0), 1e-30)
        top = low - tau_min + width * slope  # the largest calibrated score
        factor = factor * slope
        shift = P_EXP - high * slope * LOG2E
    low = gl.full([N], float("inf"), gl.float32, COLUMN)
    high = gl.full([N], float("-inf"), gl.float32, COLUMN)
    m_i = gl.full([N], -1e30, gl.float32, COLUMN)  # finite: a part may have no token of the run
    l_i = gl.zeros([N], gl.float32, COLUMN)
    acc = gl.zeros([D, N], gl.float32, MMA)
    v_weight = pow2(-exponent(o_d // 8) - P_EXP)
    v_weight = gl.where(o_d // 8 == 15, -0.5 * v_weight, v_weight)
    v_half = gl.where(o_d // 8 == 15, 0.5, 0.0)

    # A ring in shared memory: K and V of a page take a stage each, and the next K comes meanwhile;
    # the next V comes when this K has been used.
    CODES: gl.constexpr = SLOTS * (BITS * D // 2)  # words of the K codes
    P_RANGES: gl.constexpr = RANGE_OFFSET // 2
    STAGES: gl.constexpr = 2 if MODE == 1 else 3
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * D], flat)
    numbers = ring._reinterpret(p_cache.dtype.element_ty, [STAGES, 16 * D], flat)
    first = gl.load(p_run + run_begin * 2)
    last_slot = gl.load(p_run + run_begin * 2 + 1)
    base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
    k_stage = 0
    v_stage = 1
    _fetch(ring.index(k_stage), p_words + base // 2, 0, D, CODES, P_RANGES)
    async_copy.commit_group()
    if MODE != 1:
        _fetch(ring.index(v_stage), p_words + base // 2, 1, D, CODES, P_RANGES)
        async_copy.commit_group()
    for i_run in range(run_begin, run_end):
        end_slot = last_slot + 1
        first_slot = (first >> TAG) - 1
        more = i_run + 1 < run_end
        ahead = gl.minimum(i_run + 1, run_end - 1)
        first = gl.load(p_run + ahead * 2)
        last_slot = gl.load(p_run + ahead * 2 + 1)
        base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
        k_next = STAGES - k_stage - v_stage
        if more:
            _fetch(ring.index(k_next), p_words + base // 2, 0, D, CODES, P_RANGES)
        async_copy.commit_group()
        async_copy.wait_group(STAGES - 1)
        keys = ring.index(k_stage)
        k_ranges = numbers.index(k_stage)
        k_scale = k_ranges.slice(2 * CODES, D).load(gl.SliceLayout(1, B))
        k_low = k_ranges.slice(2 * CODES + D, D).load(gl.SliceLayout(0, A))
        rows, _ = gl.broadcast(k_low.to(gl.bfloat16)[None, :], gl.zeros([16, D], gl.bfloat16, A))
        q_bias = multiply_again(q_code, unfold[:, None])
        bias = mma_v2(rows, q_bias, gl.zeros([16, N], gl.float32, MMA))
        qs = multiply(q_code, k_scale.to(gl.bfloat16)[:, None])
        if SIGNED:
            bias = last_block_bias(qs, bias, (1 << BITS) - 1, A, B)
        whole = (first_slot == 0) & (end_slot == SLOTS)
        p_sum = gl.zeros([16, N], gl.float32, MMA)
        out = gl.zeros([D, N], gl.float32, MMA)
        rescale = gl.full([N], 1.0, gl.float32, COLUMN)
        for part in gl.static_range(PARTS):
            k_words = _load_part(keys, D, BITS, SLOTS, PART_SLOTS, part)
            scores = ()
            for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                scores = scores + (
                    group_scores(
                        k_words[g],
                        qs,
                        bias,
                        group_size(SLOTS, PART_SLOTS, part, g),
                        BITS,
                        MMA,
                        A,
                        D,
                    ),
                )
            if MODE != 1 and part == PARTS - 1:
                if more:
                    _fetch(ring.index(k_stage), p_words + base // 2, 1, D, CODES, P_RANGES)
                async_copy.commit_group()
            if MODE == 1:
                low_tile = gl.full([16, N], float("inf"), gl.float32, MMA)
                top_tile = gl.full([16, N], float("-inf"), gl.float32, MMA)
                if whole:
                    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                        top_tile = gl.maximum(top_tile, fold_max(scores[g], MMA))
                        low_tile = gl.minimum(low_tile, fold_min(scores[g], MMA))
                else:
                    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                        m = inside(
                            group_first(SLOTS, PART_SLOTS, part, g),
                            group_size(SLOTS, PART_SLOTS, part, g), first_slot, end_slot, MMA,
                        )  # fmt: skip
                        s = gl.where(m, scores[g], float("-inf"))
                        top_tile = gl.maximum(top_tile, fold_max(s, MMA))
                        s = gl.where(m, scores[g], float("inf"))
                        low_tile = gl.minimum(low_tile, fold_min(s, MMA))
                high = gl.maximum(high, gl.max(top_tile, 0))
                low = gl.minimum(low, gl.min(low_tile, 0))
            else:
                if not whole:
                    masked = ()
                    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                        m = inside(
                            group_first(SLOTS, PART_SLOTS, part, g),
                            group_size(SLOTS, PART_SLOTS, part, g), first_slot, end_slot, MMA,
                        )  # fmt: skip
                        masked = masked + (gl.where(m, scores[g], float("-inf")),)
                    scores = masked
                if MODE == 0:
                    top_tile = fold_max(scores[0], MMA)
                    for g in gl.static_range(1, num_groups(SLOTS, PART_SLOTS, part)):
                        top_tile = gl.maximum(top_tile, fold_max(scores[g], MMA))
                    m_new = gl.maximum(m_i, gl.max(top_tile, 0) * unit)
                    alpha = gl.exp2(m_i - m_new)
                    m_i = m_new
                    shift = P_EXP - m_new
                    rescale *= alpha
                    if part > 0:
                        p_sum *= alpha[None, :]
                        out *= alpha[None, :]
                weights = ()
                for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                    p, b = probabilities(scores[g], factor, shift, B)
                    p_sum += fold_sum(p, MMA)
                    weights = weights + (b,)
                if part == 0:
                    async_copy.wait_group(2 if PARTS == 1 else 1)
                v_words = _load_part(ring.index(v_stage), D, BITS, SLOTS, PART_SLOTS, part)
                for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                    out = group_output(v_words[g], weights[g], out, BITS, A, D)
        if MODE != 1:
            v_ranges = numbers.index(v_stage)
            v_scale = v_ranges.slice(2 * CODES, D).load(ROW).to(gl.float32)
            v_low = v_ranges.slice(2 * CODES + D, D).load(ROW).to(gl.float32)
            if SIGNED:
                v_low += v_half * (v_scale * ((1 << BITS) - 1))
            total = gl.sum(p_sum, 0) * 7.888609052210118e-31  # 2**-P_EXP
            if MODE == 0:
                l_i *= rescale
                acc *= rescale[None, :]
            l_i += total
            acc += out * (v_scale * v_weight)[:, None]
            acc += v_low[:, None] * total[None, :]
            v_stage = k_stage
        k_stage = k_next

    at = i_item * NUM_HEADS + o_h
    if MODE == 1:
        unit_score = scale * 1073741824.0
        gl.store(p_low + at, low * unit_score, mask=m_c)
        gl.store(p_high + at, high * unit_score, mask=m_c)
    else:
        total = l_i
        if MODE == 2:
            lse = top + gl.log(total)
        else:
            lse = m_i / LOG2E + gl.log(total)
        out = acc / total[None, :]
        gl.store(p_out + at[None, :] * D + o_d[:, None], out, mask=m_c[None, :])
        gl.store(p_lse + at, lse, mask=m_c)
