"""Decode attention over visual pages in Gluon: the products of :mod:`csrc_triton.fragments`.

A program is one warp: it has a share of the step's half runs (metadata.py) and one KV head.  K and
V of the next pages come into a ring in shared memory while a page is used, and a page is taken in
parts, so that twelve warps, three a scheduler, share the registers of a multiprocessor: thirteen
would leave one scheduler with four.

The bias q . lo_K of a page is the accumulator that its score products start from: a product with
rows all equal to lo_K, so every row of the result is the bias.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .fragments import (
    LOG2E,
    P_EXP,
    PAGE_MASK,
    SCORE_UNIT,
    calibration,
    exponent,
    fetch,
    fold_max,
    fold_min,
    fold_sum,
    group_first,
    group_output,
    group_scores,
    group_size,
    inside,
    last_block_bias,
    load_group,
    multiply,
    multiply_again,
    num_groups,
    num_parts,
    offset_scores,
    part_slots,
    pow2,
    probabilities,
    query_weight,
    run_slots,
)
from .gluon_compat import async_load, reinterpret


@gluon.jit
def _load_part(
    page, D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr,
    PART_SLOTS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Words of a part of a page, a tuple for each group."""
    out = ()
    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, PART)):
        out = out + (
            load_group(
                page,
                D,
                BITS,
                group_first(SLOTS, PART_SLOTS, PART, g),
                group_size(SLOTS, PART_SLOTS, PART, g),
            ),
        )
    return out


@gluon.jit
def _part_scores(
    keys, qs, bias, D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr,
    PART_SLOTS: gl.constexpr, PART: gl.constexpr, MMA: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """Scores of a part of a page: [16 sub-slots, N] for each of its groups."""
    words = _load_part(keys, D, BITS, SLOTS, PART_SLOTS, PART)
    out = ()
    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, PART)):
        out = out + (
            group_scores(
                words[g], qs, bias, group_size(SLOTS, PART_SLOTS, PART, g), BITS, MMA, A, D
            ),
        )
    return out


@gluon.jit
def _store_scores(
    p, scores, o_c, SLOTS: gl.constexpr, PART_SLOTS: gl.constexpr, PART: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Keep the first column of the scores of a part."""
    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, PART)):
        o_t = 16 * group_first(SLOTS, PART_SLOTS, PART, g)
        o_t += gl.arange(0, scores[g].shape[0], gl.SliceLayout(1, MMA))
        gl.store(p + o_t[:, None] + 0 * o_c[None, :], scores[g], mask=(o_c == 0)[None, :])


@gluon.jit
def _fetch_scores(to, p, i_run, NUM_HEADS: gl.constexpr, SLOTS: gl.constexpr):
    """Start to copy the kept scores of a run into the ring, rounded up to 256 tokens."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    p += i_run.to(gl.int64) * (NUM_HEADS * SLOTS * 16)
    async_load(to, p + gl.arange(0, 256, L))


@gluon.jit
def _fetch_keys_or_scores(
    READS: gl.constexpr, keep, ring, kept, p_page, p_scores, i_run, D: gl.constexpr,
    CODES: gl.constexpr, RANGES: gl.constexpr, NUM_HEADS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What scores are made of: K of a page, or the scores that the pass before has kept."""
    if not READS:
        fetch(ring, p_page, 0, D, CODES, RANGES)
    elif keep:
        _fetch_scores(kept, p_scores, i_run, NUM_HEADS, SLOTS)
    else:
        fetch(ring, p_page, 0, D, CODES, RANGES)


@gluon.jit
def _load_scores(
    kept, SLOTS: gl.constexpr, PART_SLOTS: gl.constexpr, PART: gl.constexpr, N: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """What :func:`_store_scores` kept, in all columns."""
    out = ()
    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, PART)):
        x = kept.slice(
            16 * group_first(SLOTS, PART_SLOTS, PART, g),
            16 * group_size(SLOTS, PART_SLOTS, PART, g),
        ).load(gl.SliceLayout(1, MMA))
        out = out + (x[:, None] + gl.zeros([x.shape[0], N], gl.float32, MMA),)
    return out


@gluon.jit
def _page_query(
    exact, q_code, unfold, ranges, D: gl.constexpr, BITS: gl.constexpr, CODES: gl.constexpr,
    MMA: gl.constexpr, A: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """The query in units of a page's K scales, and the bias q . lo_K in 16 equal rows.

    Offsets may be large, so the query is not rounded for them; in bfloat16 it is made from q_code,
    which takes fewer registers.
    """
    scale = ranges.slice(2 * CODES, D).load(gl.SliceLayout(1, B)).to(gl.bfloat16)
    low = ranges.slice(2 * CODES + D, D).load(gl.SliceLayout(0, A))
    if low.dtype == gl.bfloat16:
        bias = offset_scores(multiply_again(q_code, unfold[:, None]), low, MMA, A)
    else:
        bias = offset_scores(exact, low, MMA, A) * SCORE_UNIT
    qs = multiply(q_code, scale[:, None])
    if D == 128:  # plane block 15 exists
        bias = last_block_bias(qs, bias, (1 << BITS) - 1, A, B)
    return bias, qs


@gluon.jit
def _keys_or_kept_scores(
    READS: gl.constexpr, keep, keys, kept, qs, bias, D: gl.constexpr, BITS: gl.constexpr,
    SLOTS: gl.constexpr, PART_SLOTS: gl.constexpr, PART: gl.constexpr, MMA: gl.constexpr,
    A: gl.constexpr,
):  # fmt: skip
    """Scores of a part of a page, from what :func:`_fetch_keys_or_scores` has fetched."""
    if not READS:
        out = _part_scores(keys, qs, bias, D, BITS, SLOTS, PART_SLOTS, PART, MMA, A)
    elif keep:
        out = _load_scores(kept, SLOTS, PART_SLOTS, PART, qs.shape[1], MMA)
    else:
        out = _part_scores(keys, qs, bias, D, BITS, SLOTS, PART_SLOTS, PART, MMA, A)
    return out


@gluon.jit
def _mask(
    scores, value, first_slot, end_slot, SLOTS: gl.constexpr, PART_SLOTS: gl.constexpr,
    PART: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Scores of a part with ``value`` outside sub-slots first_slot .. end_slot - 1."""
    out = ()
    for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, PART)):
        m = inside(
            group_first(SLOTS, PART_SLOTS, PART, g), group_size(SLOTS, PART_SLOTS, PART, g),
            first_slot, end_slot, MMA,
        )  # fmt: skip
        out = out + (gl.where(m, scores[g], value),)
    return out


@gluon.jit
def _largest(scores, MMA: gl.constexpr):
    """Largest score of each row of the sub-slots and each query, [16, N]."""
    out = fold_max(scores[0], MMA)
    for g in gl.static_range(1, len(scores)):
        out = gl.maximum(out, fold_max(scores[g], MMA))
    return out


@gluon.jit
def _least(scores, MMA: gl.constexpr):
    """Smallest score likewise."""
    out = fold_min(scores[0], MMA)
    for g in gl.static_range(1, len(scores)):
        out = gl.minimum(out, fold_min(scores[g], MMA))
    return out


@gluon.jit
def _load_item(p_items, p_half_start, i_item):
    """Request, half runs and first tagged id of an item; runs of all requests before."""
    p = p_items + 4 * i_item
    req = gl.load(p)
    return req, gl.load(p + 1), gl.load(p + 2), gl.load(p + 3), gl.load(p_half_start + req) // 2


@gluon.jit
def _request_extremes(
    p_low, p_high, first_item, end_item, o_h, m_c, NUM_HEADS: gl.constexpr, MMA: gl.constexpr
):
    """Smallest and largest score of a request, [N], from those of its items."""
    N: gl.constexpr = o_h.shape[0]
    o_i = gl.arange(0, 16, gl.SliceLayout(1, MMA))
    low = gl.full([16, N], float("inf"), gl.float32, MMA)
    high = gl.full([16, N], float("-inf"), gl.float32, MMA)
    for start in range(first_item, end_item, 16):
        at = (start + o_i)[:, None] * NUM_HEADS + o_h[None, :]
        m = (start + o_i < end_item)[:, None] & m_c[None, :]
        low = gl.minimum(low, gl.load(p_low + at, mask=m, other=float("inf")))
        high = gl.maximum(high, gl.load(p_high + at, mask=m, other=float("-inf")))
    return gl.where(m_c, gl.min(low, 0), 0.0), gl.where(m_c, gl.max(high, 0), 0.0)


@gluon.jit
def _decode_kernel(
    p_q, stride_qt, stride_qh, p_words, p_cache, stride_page, stride_head,
    p_runs, stride_runs, p_items, p_item_start, p_half_start,
    p_program_item, p_plan,
    p_out, p_lse, p_low, p_high, p_scores, score_runs, scale, tau_min, tau_max,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr, D: gl.constexpr,
    BITS: gl.constexpr, SLOTS: gl.constexpr, RANGE_OFFSET: gl.constexpr, HALF: gl.constexpr,
    MODE: gl.constexpr, PDL: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """With TURNED this launch begins before that of the queries has ended."""
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
    i_program = gl.program_id(1)
    num_programs = gl.load(p_plan)
    item_begin = gl.load(p_program_item + i_program)
    item_end = gl.load(p_program_item + i_program + 1)
    if i_program >= num_programs:
        if TURNED:
            gdc_wait()  # or the launches after this one could overtake the one before it
        return

    # What is the same for all items.
    o_k = gl.arange(0, D, gl.SliceLayout(1, B))
    o_n = gl.arange(0, N, gl.SliceLayout(0, B))
    o_c = gl.arange(0, N, COLUMN)
    o_d = gl.arange(0, D, ROW)
    m_c = o_c < GROUP
    o_h = i_head * GROUP + o_c
    unit = scale * LOG2E * 1073741824.0  # 2**SCORE_EXP: accumulators to log2 of a probability
    unfold = gl.where(o_k // 8 == 15, 0xC000, 1 << (o_k // 8)).to(gl.int16)
    unfold = unfold.to(gl.bfloat16, bitcast=True)  # what takes the powers out of q_code again
    v_weight = pow2(-exponent(o_d // 8) - P_EXP)
    v_weight = gl.where(o_d // 8 == 15, -0.5 * v_weight, v_weight)
    v_half = gl.where(o_d // 8 == 15, 0.5, 0.0)

    # A ring in shared memory: K and V of a page take a stage each, and the next K comes meanwhile;
    # the next V comes when this page has been used.
    CODES: gl.constexpr = SLOTS * (BITS * D // 2)  # words of the K codes
    P_RANGES: gl.constexpr = RANGE_OFFSET // 2
    STAGES: gl.constexpr = 2 if MODE == 1 else 3
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, 8 * D], flat)
    numbers = reinterpret(ring, p_cache.dtype.element_ty, [STAGES, 16 * D], flat)
    kept = reinterpret(ring, gl.float32, [STAGES * D // 32, 256], flat)
    # With one query head a KV head, the pass for the extremes may leave its scores to the next.
    STORES: gl.constexpr = MODE == 1 and GROUP == 1
    READS: gl.constexpr = MODE == 2 and GROUP == 1
    keep = gl.load(p_plan + 5) <= score_runs
    p_kept = p_scores + i_head * (SLOTS * 16)
    if READS and PDL:
        gdc_wait()  # for the kept scores
    req, begin, end, first, run_base = _load_item(p_items, p_half_start, item_begin)
    base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
    k_stage = 0
    v_stage = 1
    _fetch_keys_or_scores(
        READS, keep, ring.index(k_stage), kept.index(k_stage * (D // 32)), p_words + base // 2,
        p_kept, run_base + begin // 2, D, CODES, P_RANGES, NUM_HEADS, SLOTS,
    )  # fmt: skip
    async_copy.commit_group()
    if MODE != 1:
        fetch(ring.index(v_stage), p_words + base // 2, 1, D, CODES, P_RANGES)
        async_copy.commit_group()
    for i_item in range(item_begin, item_end):
        run_begin = begin // 2
        run_end = (end + 1) // 2
        p_run = p_runs + req.to(gl.int64) * stride_runs
        last_slot = gl.load(p_run + run_begin * 2 + 1)
        # Its first page is fetched while the last one of this item is used.
        more_items = i_item + 1 < item_end
        next_req, next_begin, next_end, next_first, next_base = _load_item(
            p_items, p_half_start, gl.minimum(i_item + 1, item_end - 1)
        )

        # Queries as a B operand [D, N] with the powers of the code bits.
        if TURNED:
            gdc_wait()
        p_qi = p_q + req.to(gl.int64) * stride_qt + (i_head * GROUP + o_n[None, :]) * stride_qh
        q = gl.load(p_qi + o_k[:, None], mask=(o_n < GROUP)[None, :], other=0.0)
        exact = q.to(p_cache.dtype.element_ty)
        q_code = (q.to(gl.float32) * query_weight(o_k)[:, None]).to(gl.bfloat16)
        factor = gl.zeros([N], gl.float32, COLUMN) + unit
        shift = gl.zeros([N], gl.float32, COLUMN)
        if MODE == 2:
            if PDL:
                gdc_wait()  # for the extremes; all else was there before the launch that finds them
            first_item = gl.load(p_item_start + req)
            end_item = gl.load(p_item_start + req + 1)
            low, high = _request_extremes(
                p_low, p_high, first_item, end_item, o_h, m_c, NUM_HEADS, MMA
            )
            slope, top = calibration(low, high, tau_min, tau_max)
            factor = factor * slope
            shift = P_EXP - high * slope * LOG2E
        low = gl.full([N], float("inf"), gl.float32, COLUMN)
        high = gl.full([N], float("-inf"), gl.float32, COLUMN)
        m_i = gl.full([N], -1e30, gl.float32, COLUMN)  # finite: a part may have no token of the run
        l_i = gl.zeros([N], gl.float32, COLUMN)
        acc = gl.zeros([D, N], gl.float32, MMA)
        for i_run in range(run_begin, run_end):
            first_slot, end_slot = run_slots(first, last_slot, i_run, begin, end, HALF)
            more_runs = i_run + 1 < run_end
            more = more_runs | more_items
            ahead = gl.minimum(i_run + 1, run_end - 1)
            first = gl.load(p_run + ahead * 2)
            last_slot = gl.load(p_run + ahead * 2 + 1)
            page = gl.where(more_runs, first, next_first) & PAGE_MASK
            base = page.to(gl.int64) * stride_page + i_head * stride_head
            k_next = STAGES - k_stage - v_stage
            if more:
                _fetch_keys_or_scores(
                    READS, keep, ring.index(k_next), kept.index(k_next * (D // 32)),
                    p_words + base // 2, p_kept,
                    gl.where(more_runs, run_base + i_run + 1, next_base + next_begin // 2),
                    D, CODES, P_RANGES, NUM_HEADS, SLOTS,
                )  # fmt: skip
            async_copy.commit_group()
            async_copy.wait_group(STAGES - 1)
            if READS:
                bias = gl.zeros([16, N], gl.float32, MMA)
                qs = q_code
                if not keep:
                    bias, qs = _page_query(
                        exact, q_code, unfold, numbers.index(k_stage), D, BITS, CODES, MMA, A, B
                    )
            else:
                bias, qs = _page_query(
                    exact, q_code, unfold, numbers.index(k_stage), D, BITS, CODES, MMA, A, B
                )
            whole = (first_slot == 0) & (end_slot == SLOTS)
            p_sum = gl.zeros([16, N], gl.float32, MMA)
            out = gl.zeros([D, N], gl.float32, MMA)
            rescale = gl.full([N], 1.0, gl.float32, COLUMN)
            for part in gl.static_range(PARTS):
                if (first_slot < (part + 1) * PART_SLOTS) & (end_slot > part * PART_SLOTS):
                    p_part = p_kept + (run_base + i_run).to(gl.int64) * (NUM_HEADS * SLOTS * 16)
                    scores = _keys_or_kept_scores(
                        READS, keep, ring.index(k_stage), kept.index(k_stage * (D // 32)),
                        qs, bias, D, BITS, SLOTS, PART_SLOTS, part, MMA, A,
                    )  # fmt: skip
                    if STORES:  # noqa: SIM102 - one is known when compiled, one is not
                        if keep:
                            _store_scores(p_part, scores, o_c, SLOTS, PART_SLOTS, part, MMA)
                    if MODE == 1:
                        if whole:
                            low_tile = _least(scores, MMA)
                            top_tile = _largest(scores, MMA)
                        else:
                            low_tile = _least(
                                _mask(
                                    scores, float("inf"), first_slot, end_slot, SLOTS, PART_SLOTS,
                                    part, MMA,
                                ), MMA,
                            )  # fmt: skip
                            top_tile = _largest(
                                _mask(
                                    scores, float("-inf"), first_slot, end_slot, SLOTS, PART_SLOTS,
                                    part, MMA,
                                ), MMA,
                            )  # fmt: skip
                        high = gl.maximum(high, gl.max(top_tile, 0))
                        low = gl.minimum(low, gl.min(low_tile, 0))
                    else:
                        if not whole:
                            scores = _mask(
                                scores, float("-inf"), first_slot, end_slot, SLOTS, PART_SLOTS,
                                part, MMA,
                            )  # fmt: skip
                        if MODE == 0:
                            m_new = gl.maximum(m_i, gl.max(_largest(scores, MMA), 0) * unit)
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
                        async_copy.wait_group(1)
                        v_words = _load_part(ring.index(v_stage), D, BITS, SLOTS, PART_SLOTS, part)
                        for g in gl.static_range(num_groups(SLOTS, PART_SLOTS, part)):
                            out = group_output(v_words[g], weights[g], out, BITS, A, D)
            if MODE != 1:
                async_copy.wait_group(1)
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
                if more:
                    fetch(ring.index(k_stage), p_words + base // 2, 1, D, CODES, P_RANGES)
                async_copy.commit_group()
                v_stage = k_stage
            k_stage = k_next

        at = i_item.to(gl.int64) * NUM_HEADS + o_h
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
            out = acc / gl.where(total > 0, total, 1.0)[None, :]
            gl.store(p_out + at[None, :] * D + o_d[:, None], out, mask=m_c[None, :])
            gl.store(p_lse + at, lse, mask=m_c)
        req, begin, end, first, run_base = next_req, next_begin, next_end, next_first, next_base
