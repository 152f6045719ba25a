"""Attention over pages of a profile in Gluon: components of any width, K and V apart.

A program is one warp.  In decode it has a share of the step's half runs and the queries of one KV
head, as in :mod:`csrc_triton.decode_gluon`; in prefill a share of a request's runs and 8 rows,
pairs of query token and head of one KV head.  What differs from the kernels for one width is that
planes are rows and columns of their own:

* scores: the query has a row for each plane, its component's times ``2**bit``
  (``csrc_triton.basis.spread_query``).  It waits in shared memory; a page's K scales are copied
  into the order of planes, so that their product is as cheap as with one bit.
* output: the accumulator has a row for each plane, in units of the page's V scale as in
  :mod:`csrc_triton.prefill_gluon`, and one for each component for the offsets.  What the planes
  stand for is added up in the merge (:mod:`csrc_triton.merge`, :mod:`csrc_triton.prefill`).

Copies move pairs of 16-bit scales, so neighbouring planes must be neighbouring components
(``DeviceFormat.key_pairs``).

The planes of a part are taken in *pieces*: 128 planes as often as they fit, then 64 and 32.  A
piece is a section of the page or a half of one of 256 planes (format.py).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .decode_gluon import _request_extremes
from .fragments import (
    LEAST_SUM,
    LOG2E,
    PAGE_MASK,
    SCORE_UNIT,
    calibration,
    exponent,
    flushed_exp2,
    flushed_probabilities,
    fold_max,
    fold_min,
    fold_sum,
    groups,
    inside,
    key_operand,
    last_block_bias,
    load_tile,
    multiply,
    num_groups,
    offset_scores,
    pow2,
    repeat_rows,
    run_slots,
    value_operand,
)
from .gluon_compat import async_load, reinterpret

_SLACK = gl.constexpr(8.0)
"""Power of two by which a score may exceed the one that probabilities are relative to."""

_P_EXP = gl.constexpr(60)
_P_UNIT = gl.constexpr(2.0**-60)
"""Scale of P, as in prefill."""

_LEAST = gl.constexpr(2.0**-20)
"""Least unit of a plane: a scale of 0 has none, and a smaller one is lost in rounding."""

ROWS = 8
"""Rows of a program."""

_N = gl.constexpr(ROWS)


@gluon.constexpr_function
def _first(slots, g):
    """First sub-slot of a group of a page."""
    return groups(slots, slots, 0)[g][0]


@gluon.constexpr_function
def _count(slots, g):
    """Sub-slots of a group of a page."""
    return groups(slots, slots, 0)[g][1]


@gluon.constexpr_function
def _num_pieces(planes):
    """Pieces of a part."""
    return planes // 128 + (planes % 128).bit_count()


@gluon.constexpr_function
def _piece(planes, i):
    """First plane and number of planes of a piece."""
    whole = planes // 128
    if i < whole:
        return 128 * i, 128
    first, rest = 128 * whole, planes % 128
    size = 1 << (rest.bit_length() - 1)
    while i > whole:
        first, rest, i = first + size, rest - size, i - 1
        size = 1 << (rest.bit_length() - 1)
    return first, size


@gluon.constexpr_function
def _piece_first(planes, i):
    """First plane of a piece."""
    return _piece(planes, i)[0]


@gluon.constexpr_function
def _piece_size(planes, i):
    """Planes of a piece."""
    return _piece(planes, i)[1]


@gluon.constexpr_function
def num_sections(planes):
    """Sections of a part."""
    return planes.bit_count()


@gluon.constexpr_function
def section_size(planes, i):
    """Planes of a section."""
    while i > 0:
        planes, i = planes - (1 << (planes.bit_length() - 1)), i - 1
    return 1 << (planes.bit_length() - 1)


@gluon.constexpr_function
def section_first(planes, i):
    """First plane of a section."""
    return planes & -(2 * section_size(planes, i))


@gluon.constexpr_function
def _chunks(planes, slots):
    """Section, first word of it and number of words of what is copied at once: powers of two."""
    out, section = (), 0
    while section < planes.bit_count():
        words, first = slots * section_size(planes, section) // 2, 0
        while words > first:
            size = 1 << ((words - first).bit_length() - 1)
            out, first = (*out, (section, first, size)), first + size
        section += 1
    return out


@gluon.constexpr_function
def _num_chunks(planes, slots):
    """Chunks of a part."""
    return len(_chunks(planes, slots))


@gluon.constexpr_function
def _chunk_words(planes, slots, i):
    """Words of a chunk."""
    return _chunks(planes, slots)[i][2]


@gluon.constexpr_function
def _chunk_start(planes, slots, i):
    """Word of a part that a chunk begins with."""
    section, first, _ = _chunks(planes, slots)[i]
    return slots * section_first(planes, section) // 2 + first


@gluon.constexpr_function
def _chunk_at(planes, slots, section, word):
    """Chunk that holds a word of a section, and the word's place in it."""
    for i, chunk in enumerate(_chunks(planes, slots)):
        of, first, size = chunk
        if of == section and first <= word < first + size:
            return i, word - first
    return None


@gluon.constexpr_function
def _chunk_of(planes, slots, section, word):
    """Chunk that holds a word of a section."""
    return _chunk_at(planes, slots, section, word)[0]


@gluon.constexpr_function
def _place_of(planes, slots, section, word):
    """Place of a word of a section in its chunk."""
    return _chunk_at(planes, slots, section, word)[1]


@gluon.jit
def _code_buffers(PLANES: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for codes.  One for each copy: between copies into one there is a barrier."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    out = ()
    for i in gl.static_range(_num_chunks(PLANES, SLOTS)):
        out = out + (
            gl.allocate_shared_memory(gl.int32, [STAGES, _chunk_words(PLANES, SLOTS, i)], flat),
        )
    return out


@gluon.constexpr_function
def _copy_layout(words):
    """As many bytes a lane as there are, up to 16."""
    return gl.BlockedLayout([min(words // 32, 4)], [32], [1], [0])


@gluon.jit
def _fetch_codes(chunks, stage, p_part, PLANES: gl.constexpr, SLOTS: gl.constexpr):
    """Start to copy the codes of K or V."""
    for i in gl.static_range(_num_chunks(PLANES, SLOTS)):
        o = gl.arange(
            0, _chunk_words(PLANES, SLOTS, i), _copy_layout(_chunk_words(PLANES, SLOTS, i))
        )
        o = gl.max_contiguous(gl.multiple_of(o, 4), 4)
        async_load(chunks[i].index(stage), p_part + _chunk_start(PLANES, SLOTS, i) + o)


@gluon.jit
def _fetch_ranges(scales, low, stage, pairs, p_ranges, D: gl.constexpr):
    """Start to copy scales, in the order of planes, and offsets of K or V."""
    for i in gl.static_range(len(pairs)):
        async_load(scales[i].index(stage), p_ranges + pairs[i])
    L: gl.constexpr = gl.BlockedLayout([D // 64], [32], [1], [0])
    o = gl.arange(0, D // 2, L)
    async_load(low.index(stage), p_ranges + D // 2 + o)


@gluon.jit
def _pairs(p_pairs, PLANES: gl.constexpr):
    """Where the scales of two neighbouring planes are, for each piece."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    out = ()
    for i in gl.static_range(_num_pieces(PLANES)):
        o = _piece_first(PLANES, i) // 2 + gl.arange(0, _piece_size(PLANES, i) // 2, L)
        out = out + (gl.load(p_pairs + o),)
    return out


@gluon.jit
def _scale_buffers(PLANES: gl.constexpr):
    """Shared memory for the scales of the pieces, in two stages."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    out = ()
    for i in gl.static_range(_num_pieces(PLANES)):
        out = out + (gl.allocate_shared_memory(gl.int32, [2, _piece_size(PLANES, i) // 2], flat),)
    return out


@gluon.jit
def _numbers(buffer, DTYPE: gl.constexpr):
    """Words of shared memory, [2, words], as 16-bit numbers."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    NUMBERS: gl.constexpr = 2 * buffer.shape[1]
    return reinterpret(buffer, DTYPE, [2, NUMBERS], flat)


@gluon.jit
def _code_tile(
    chunks, stage, PLANES: gl.constexpr, SLOTS: gl.constexpr, SECTION: gl.constexpr,
    FIRST: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Words of each lane of the tile that begins with sub-slot FIRST, int32 [32, WORDS]."""
    at: gl.constexpr = FIRST * section_size(PLANES, SECTION) // 2
    chunk = chunks[_chunk_of(PLANES, SLOTS, SECTION, at)].index(stage)
    return load_tile(chunk, _place_of(PLANES, SLOTS, SECTION, at), WORDS)


@gluon.jit
def _load_section(
    chunks, stage, PLANES: gl.constexpr, SLOTS: gl.constexpr, SECTION: gl.constexpr,
    FIRST: gl.constexpr, COUNT: gl.constexpr,
):  # fmt: skip
    """For each piece of a section and each of COUNT sub-slots, int32 [8 rows, 4 columns, 2 groups].

    Bit i of a half-word is plane block i of the piece.
    """
    SIZE: gl.constexpr = section_size(PLANES, SECTION)
    if SIZE == 256:
        low, high = (), ()
        for t in gl.static_range(COUNT):
            w = _code_tile(chunks, stage, PLANES, SLOTS, SECTION, FIRST + t, 4)
            w0, w1 = w.reshape([8, 4, 2, 2]).split()
            low, high = low + (w0,), high + (w1,)
        out = (low, high)
    elif COUNT == 1:
        gl.static_assert(SIZE >= 64)
        w = _code_tile(chunks, stage, PLANES, SLOTS, SECTION, FIRST, SIZE // 64)
        if SIZE == 128:
            out = ((w.reshape([8, 4, 2]),),)
        else:
            w = w.reshape([8, 4])
            out = ((gl.join(w, w >> 8),),)
    elif SIZE == 128:
        words = ()
        for t in gl.static_range(COUNT // 2):
            w = _code_tile(chunks, stage, PLANES, SLOTS, SECTION, FIRST + 2 * t, 4)
            w0, w1 = w.reshape([8, 4, 2, 2]).permute((0, 1, 3, 2)).split()
            words = words + (w0, w1)
        out = (words,)
    elif SIZE == 64:
        w = _code_tile(chunks, stage, PLANES, SLOTS, SECTION, FIRST, COUNT)
        if COUNT == 4:
            even, odd = w.reshape([8, 4, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = (
                (
                    gl.join(w0, w0 >> 8), gl.join(w1, w1 >> 8),
                    gl.join(w2, w2 >> 8), gl.join(w3, w3 >> 8),
                ),
            )  # fmt: skip
        else:
            w0, w1 = w.reshape([8, 4, 2]).split()
            out = ((gl.join(w0, w0 >> 8), gl.join(w1, w1 >> 8)),)
    else:
        gl.static_assert(SIZE == 32)
        w = _code_tile(chunks, stage, PLANES, SLOTS, SECTION, FIRST, COUNT // 2)
        if COUNT == 4:
            w0, w1 = w.reshape([8, 4, 2]).split()
            out = (
                (
                    gl.join(w0, w0 >> 4), gl.join(w0 >> 8, w0 >> 12),
                    gl.join(w1, w1 >> 4), gl.join(w1 >> 8, w1 >> 12),
                ),
            )  # fmt: skip
        else:
            w = w.reshape([8, 4])
            out = ((gl.join(w, w >> 4), gl.join(w >> 8, w >> 12)),)
    return out


@gluon.jit
def _load_codes(
    chunks, stage, PLANES: gl.constexpr, SLOTS: gl.constexpr, FIRST: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """The same for all pieces."""
    out = ()
    for i in gl.static_range(num_sections(PLANES)):
        out = out + _load_section(chunks, stage, PLANES, SLOTS, i, FIRST, COUNT)
    return out


@gluon.constexpr_function
def _query_layout(planes):
    """Shared memory of the query of a piece, [planes, N]: what ldmatrix reads without conflicts."""
    return gl.SwizzledSharedLayout(8, max(1, 64 // planes), min(8, planes // 8), [0, 1])


@gluon.jit
def _query_buffers(PLANES: gl.constexpr, N: gl.constexpr):
    """Shared memory for the query of the pieces."""
    out = ()
    for i in gl.static_range(_num_pieces(PLANES)):
        out = out + (
            gl.allocate_shared_memory(
                gl.bfloat16, [_piece_size(PLANES, i), N], _query_layout(_piece_size(PLANES, i))
            ),
        )
    return out


_COPIED = gl.constexpr(gl.BlockedLayout([8, 1], [4, 8], [1, 1], [0, 1]))
"""Layout of copies of the query, [planes, N]: 16 bytes a lane."""


@gluon.jit
def _fetch_query(queries, p_rows, PLANES: gl.constexpr):
    """Start to copy the planes of some rows [N]."""
    for i in gl.static_range(_num_pieces(PLANES)):
        o = gl.arange(0, _piece_size(PLANES, i), gl.SliceLayout(1, _COPIED))
        async_load(queries[i], p_rows[None, :] + _piece_first(PLANES, i) + o[:, None])


@gluon.jit
def _page_query(
    q, queries, scales, low, stage, DTYPE: gl.constexpr, PLANES: gl.constexpr, MMA: gl.constexpr,
    A: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """The bias q . lo_K in 16 equal rows, and the query in units of a page's K scales."""
    low = _numbers(low, DTYPE).index(stage).load(gl.SliceLayout(0, A))
    bias = offset_scores(q, low, MMA, A) * SCORE_UNIT
    out = ()
    for i in gl.static_range(_num_pieces(PLANES)):
        scale = _numbers(scales[i], DTYPE).index(stage).load(gl.SliceLayout(1, B))
        qs = multiply(queries[i].load(B), scale.to(gl.bfloat16)[:, None])
        if _piece_size(PLANES, i) == 128:  # plane block 15 exists
            bias = last_block_bias(qs, bias, 1, A, B)
        out = out + (qs,)
    return bias, out


@gluon.jit
def _value_units(scales, stage, DTYPE: gl.constexpr, ROW: gl.constexpr):
    """V scales of the planes, for each piece."""
    out = ()
    for i in gl.static_range(len(scales)):
        x = _numbers(scales[i], DTYPE).index(stage).load(ROW).to(gl.float32)
        out = out + (gl.maximum(x, _LEAST),)
    return out


@gluon.jit
def _inverse(x):
    """1 / x, good to the last bit but one."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


# One compilation for all steps: what changes from step to step is not specialised.
@gluon.jit(do_not_specialize=["first_req", "num_reqs", "first_query", "window", "splits"])
def _attend_kernel(
    p_q, stride_qt, stride_qh, p_planes, p_words, p_cache, stride_page, stride_head,
    p_runs, stride_runs, p_items, p_item_start, p_program_item, p_plan,
    p_num_runs, p_query_start, first_req, num_reqs, first_query, window, splits,
    p_out, p_lse, p_low, p_high, p_key_pairs, p_value_pairs,
    scale, tau_min, tau_max,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    KEY_PLANES: gl.constexpr, VALUE_PLANES: gl.constexpr, SLOTS: gl.constexpr,
    RANGE_OFFSET: gl.constexpr, HALF: gl.constexpr, MODE: gl.constexpr, DECODE: gl.constexpr,
    PDL: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """In prefill, rows are queries ``first_query .. first_query + window - 1`` of each request.

    With WAITS this launch begins before that of queries or extremes has ended; with PDL the next
    one may begin so.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)  # planes, channels or tokens of an accumulator
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)  # queries
    DTYPE: gl.constexpr = p_cache.dtype.element_ty
    PIECES: gl.constexpr = _num_pieces(VALUE_PLANES)
    N: gl.constexpr = _N

    o_c = gl.arange(0, N, COLUMN)
    o_k = gl.arange(0, D, gl.SliceLayout(1, B))
    o_n = gl.arange(0, N, gl.SliceLayout(0, B))
    o_r = gl.arange(0, N, gl.SliceLayout(0, _COPIED))
    o_d = gl.arange(0, D, ROW)
    unit = scale * LOG2E * 1073741824.0  # 2**SCORE_EXP: accumulators to log2 of a probability
    if DECODE:
        if PDL:
            gdc_launch_dependents()  # the next launch waits for this one's results itself
        i_head = gl.program_id(0)
        i_program = gl.program_id(1)
        num_programs = gl.load(p_plan)
        item_begin = gl.load(p_program_item + i_program)
        item_end = gl.load(p_program_item + i_program + 1)
        if i_program >= num_programs:
            if WAITS:
                gdc_wait()  # or the launches after this one could overtake the one before it
            return
        m_c = o_c < GROUP
    else:
        i_head = gl.program_id(1)
        i_req = gl.program_id(2) // splits
        i_split = gl.program_id(2) % splits
        req = first_req + i_req
        query_begin = gl.load(p_query_start + req) + first_query
        num_rows = gl.minimum(gl.load(p_query_start + req + 1) - query_begin, window) * GROUP
        first_row = gl.program_id(0) * N
        if first_row >= num_rows:
            return
        num_runs = gl.load(p_num_runs + req)
        item_begin = 0
        item_end = 1
        m_c = first_row + o_c < num_rows

    # Two stages for K and the ranges of both parts, which come while the page before is used; the
    # codes of V come when those of the page before have been used.
    RANGES: gl.constexpr = RANGE_OFFSET // 2
    CODES: gl.constexpr = SLOTS * KEY_PLANES // 2  # words of the K codes
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    keys = _code_buffers(KEY_PLANES, SLOTS, 2)
    key_scales = _scale_buffers(KEY_PLANES)
    key_low = gl.allocate_shared_memory(gl.int32, [2, D // 2], flat)
    queries = _query_buffers(KEY_PLANES, N)
    key_pairs = _pairs(p_key_pairs, KEY_PLANES)
    if MODE != 1:
        values = _code_buffers(VALUE_PLANES, SLOTS, 1)
        value_scales = _scale_buffers(VALUE_PLANES)
        value_low = gl.allocate_shared_memory(gl.int32, [2, D // 2], flat)
        value_pairs = _pairs(p_value_pairs, VALUE_PLANES)
    for i_item in range(item_begin, item_end):
        if DECODE:
            req = gl.load(p_items + 4 * i_item)
            begin = gl.load(p_items + 4 * i_item + 1)
            end = gl.load(p_items + 4 * i_item + 2)
            first = gl.load(p_items + 4 * i_item + 3)
            run_begin = begin // 2
            run_end = (end + 1) // 2
            p_run = p_runs + req.to(gl.int64) * stride_runs
            last_slot = gl.load(p_run + run_begin * 2 + 1)
        else:
            run_begin = (num_runs * i_split.to(gl.int64) // splits).to(gl.int32)
            run_end = (num_runs * (i_split + 1).to(gl.int64) // splits).to(gl.int32)
            begin = 2 * run_begin
            end = 2 * run_end
            p_run = p_runs + req.to(gl.int64) * stride_runs
            earliest = gl.maximum(gl.minimum(run_begin, run_end - 1), 0)  # a share may be empty
            first = gl.load(p_run + earliest * 2)
            last_slot = gl.load(p_run + earliest * 2 + 1)
        base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
        p_page = p_words + base // 2
        stage = 0
        _fetch_codes(keys, 0, p_page, KEY_PLANES, SLOTS)
        _fetch_ranges(key_scales, key_low, 0, key_pairs, p_page + RANGES, D)
        if MODE != 1:
            _fetch_ranges(value_scales, value_low, 0, value_pairs, p_page + RANGES + D, D)
        async_copy.commit_group()
        if MODE != 1:
            _fetch_codes(values, 0, p_page + CODES, VALUE_PLANES, SLOTS)
            async_copy.commit_group()

        if DECODE:
            if WAITS:
                gdc_wait()  # for queries and extremes; all else was there before their launches
            p_query = p_q + req.to(gl.int64) * stride_qt
            p_query += (i_head * GROUP + gl.minimum(o_n, GROUP - 1)) * stride_qh
            row = req.to(gl.int64) * NUM_HEADS + i_head * GROUP + gl.minimum(o_r, GROUP - 1)
            at = i_item.to(gl.int64) * NUM_HEADS + i_head * GROUP + o_c
        else:
            row = gl.minimum(first_row + o_n, num_rows - 1)
            p_query = p_q + (query_begin + row // GROUP).to(gl.int64) * stride_qt
            p_query += (i_head * GROUP + row % GROUP) * stride_qh
            row = gl.minimum(first_row + o_r, num_rows - 1)
            row = (query_begin + row // GROUP).to(gl.int64) * NUM_HEADS + row % GROUP
            row += i_head * GROUP
            at = (i_split * num_reqs + i_req).to(gl.int64) * window
            at = (at + (first_row + o_c) // GROUP) * NUM_HEADS
            at += i_head * GROUP + (first_row + o_c) % GROUP
        _fetch_query(queries, p_planes + row * KEY_PLANES, KEY_PLANES)
        async_copy.commit_group()
        q = gl.load(p_query[None, :] + o_k[:, None]).to(DTYPE)
        factor = gl.zeros([N], gl.float32, COLUMN) + unit
        shift = gl.zeros([N], gl.float32, COLUMN)
        if MODE == 2:
            if DECODE:
                low, high = _request_extremes(
                    p_low, p_high, gl.load(p_item_start + req), gl.load(p_item_start + req + 1),
                    i_head * GROUP + o_c, m_c, NUM_HEADS, MMA,
                )  # fmt: skip
            else:
                low = gl.full([N], float("inf"), gl.float32, COLUMN)
                high = gl.full([N], float("-inf"), gl.float32, COLUMN)
                share = (at * 0 + num_reqs) * window * NUM_HEADS
                for i_other in range(splits):
                    there = at + (i_other - i_split) * share
                    low = gl.minimum(low, gl.load(p_low + there, mask=m_c, other=0.0))
                    high = gl.maximum(high, gl.load(p_high + there, mask=m_c, other=0.0))
            slope, calibrated = calibration(low, high, tau_min, tau_max)
            factor = factor * slope
            shift = _P_EXP - high * slope * LOG2E
        low = gl.full([N], float("inf"), gl.float32, COLUMN)
        high = gl.full([N], float("-inf"), gl.float32, COLUMN)
        m_i = gl.full([N], -1e30, gl.float32, COLUMN)
        l_i = gl.zeros([N], gl.float32, COLUMN)
        acc = ()
        for i in gl.static_range(PIECES):
            acc = acc + (gl.zeros([_piece_size(VALUE_PLANES, i), N], gl.float32, MMA),)
        offsets = gl.zeros([D, N], gl.float32, MMA)
        for i_run in range(run_begin, run_end):
            first_slot, end_slot = run_slots(first, last_slot, i_run, begin, end, HALF)
            more = i_run + 1 < run_end
            ahead = gl.minimum(i_run + 1, run_end - 1)
            first = gl.load(p_run + ahead * 2)
            last_slot = gl.load(p_run + ahead * 2 + 1)
            base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
            p_page = p_words + base // 2
            if MODE != 1:
                units = _value_units(value_scales, 1 - stage, DTYPE, ROW)  # of the page before
            if more:
                _fetch_codes(keys, 1 - stage, p_page, KEY_PLANES, SLOTS)
                _fetch_ranges(key_scales, key_low, 1 - stage, key_pairs, p_page + RANGES, D)
                if MODE != 1:
                    _fetch_ranges(
                        value_scales, value_low, 1 - stage, value_pairs, p_page + RANGES + D, D
                    )
            async_copy.commit_group()
            async_copy.wait_group(1 if MODE == 1 else 2)
            if i_run == run_begin:
                async_copy.wait_group(1)  # the query came last
            if MODE != 1:
                inverse = _value_units(value_scales, stage, DTYPE, ROW)
                scaled = ()
                for i in gl.static_range(PIECES):
                    ratio = gl.where(i_run > run_begin, units[i] * _inverse(inverse[i]), 1.0)
                    scaled = scaled + (acc[i] * ratio[:, None],)
                acc = scaled
            bias, qs = _page_query(
                q, queries, key_scales, key_low, stage, DTYPE, KEY_PLANES, MMA, A, B
            )
            whole = (first_slot == 0) & (end_slot == SLOTS)
            total = gl.zeros([16, N], gl.float32, MMA)
            for g in gl.static_range(num_groups(SLOTS, SLOTS, 0)):
                if (first_slot < _first(SLOTS, g) + _count(SLOTS, g)) & (
                    end_slot > _first(SLOTS, g)
                ):
                    words = _load_codes(
                        keys, stage, KEY_PLANES, SLOTS, _first(SLOTS, g), _count(SLOTS, g)
                    )
                    s = repeat_rows(bias, _count(SLOTS, g), MMA)
                    for i in gl.static_range(_num_pieces(KEY_PLANES)):
                        x = key_operand(words[i], A, _piece_size(KEY_PLANES, i))
                        s = mma_v2(x, qs[i], s)
                    s_low = s
                    if not whole:
                        used = inside(_first(SLOTS, g), _count(SLOTS, g), first_slot, end_slot, MMA)
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
                                scaled = ()
                                for i in gl.static_range(PIECES):
                                    scaled = scaled + (acc[i] * alpha[None, :],)
                                acc = scaled
                                offsets = offsets * alpha[None, :]
                                total = total * alpha[None, :]
                                l_i = l_i * alpha
                            shift = _P_EXP - m_i
                        p, b = flushed_probabilities(s, factor, shift, B)
                        total += fold_sum(p, MMA)
                        async_copy.wait_group(1)
                        words = _load_codes(
                            values, 0, VALUE_PLANES, SLOTS, _first(SLOTS, g), _count(SLOTS, g)
                        )
                        added = ()
                        for i in gl.static_range(PIECES):
                            x = value_operand(words[i], A, _piece_size(VALUE_PLANES, i))
                            added = added + (mma_v2(x, b, acc[i]),)
                        acc = added
            if MODE != 1:
                async_copy.wait_group(1)
                v_low = _numbers(value_low, DTYPE).index(stage).load(ROW).to(gl.float32)
                page_total = gl.sum(total, 0)
                l_i += page_total * _P_UNIT
                offsets += v_low[:, None] * (page_total * _P_UNIT)[None, :]
                signed = ()
                for i in gl.static_range(PIECES):
                    x = acc[i]
                    if _piece_size(VALUE_PLANES, i) == 128:
                        # Plane block 15 reads as 1 or -1: a code bit is half of 1 minus that.
                        o_p = gl.arange(0, 128, ROW)
                        x = gl.where((o_p // 8 == 15)[:, None], x - page_total[None, :], x)
                    signed = signed + (x,)
                acc = signed
                if more:
                    _fetch_codes(values, 0, p_page + CODES, VALUE_PLANES, SLOTS)
                async_copy.commit_group()
            stage = 1 - stage

        if MODE == 1:
            unit_score = scale * 1073741824.0
            gl.store(p_low + at, low * unit_score, mask=m_c)
            gl.store(p_high + at, high * unit_score, mask=m_c)
        else:
            some = l_i > LEAST_SUM
            safe = gl.where(some, l_i, 1.0)
            if MODE == 2:
                lse = calibrated + gl.log(safe)
            else:
                lse = m_i / LOG2E + gl.log(safe)
            gl.store(p_lse + at, gl.where(some, lse, float("-inf")), mask=m_c)
            share = 1.0 / safe
            p_row = p_out + (at * (VALUE_PLANES + D))[None, :]
            units = _value_units(value_scales, 1 - stage, DTYPE, ROW)
            for i in gl.static_range(PIECES):
                o_p = gl.arange(0, _piece_size(VALUE_PLANES, i), ROW)
                weight = units[i] * pow2(-exponent(o_p // 8) - _P_EXP)
                weight = gl.where(o_p // 8 == 15, -0.5 * weight, weight)
                out = acc[i] * weight[:, None] * share[None, :]
                if not DECODE:  # without a page there is no unit either
                    out = gl.where(some[None, :], out, 0.0)
                p_plane = p_row + (_piece_first(VALUE_PLANES, i) + o_p)[:, None]
                gl.store(p_plane, out, mask=m_c[None, :])
            out = offsets * share[None, :]
            gl.store(p_row + (VALUE_PLANES + o_d)[:, None], out, mask=m_c[None, :])
