"""Decode attention over visual pages in Gluon: codes become mma operands without leaving registers.

A program is one warp: it owns an item (some runs of one request) and one KV head.  In a page each
lane owns whole 32-bit words whose order is that of the A operand of ``mma.m16n8k16`` (format.py).
With the queries of the KV head as N = 8 (or 16) columns,

* scores: A = K codes, rows are the 16 tokens of a sub-slot, columns are channels; B = q * s_K;
* output: A = V codes, rows are channels, columns are tokens; B = P.

``word & (0x00010001 << i)`` is an A register: two bfloat16 numbers that are 0 or the power of two
``2**EXPONENT[i]`` whose encoding is bit i alone (bit 15 is the sign, so it is moved to bit 14).
One LOP3 unpacks two codes.  The power depends on the channel block only, so it folds into q * s_K
for the scores and into s_V for the output.  Exponents reach 2**-133, hence the common factors
``2**-SCORE_EXP`` on scores and ``2**P_EXP`` on P that keep every product a normal number; nothing
on the way flushes subnormals to zero.

The softmax probabilities leave the scores' accumulator as (token, query) and enter the second
product as (query, token): ``movmatrix`` transposes an 8 x 8 block of 16-bit numbers inside the
warp.

The bias q . lo_K of a page is the accumulator that its score products start from: a product with
rows all equal to lo_K, so every row of the result is the bias.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tables import TAG_SHIFT

_TAG = gl.constexpr(TAG_SHIFT)
_PAGE_MASK = gl.constexpr((1 << TAG_SHIFT) - 1)
_SCORE_EXP = gl.constexpr(30)
_P_EXP = gl.constexpr(100)
_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def _key_layout(tokens, blocks):
    """[tokens, blocks, 4, 2] (K) with the registers and lanes of an A operand of 16 x 8 blocks."""
    return gl.DistributedLinearLayout(
        [
            [0, 0, 0, 1],
            [8, 0, 0, 0],
            *[[0, 1 << i, 0, 0] for i in range(blocks.bit_length() - 1)],
            *[[16 << i, 0, 0, 0] for i in range((tokens // 16).bit_length() - 1)],
        ],
        [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [], [], [tokens, blocks, 4, 2],
    )  # fmt: skip


@gluon.constexpr_function
def _value_layout(blocks, groups):
    """[blocks, 8 channels, token groups, 4, 2] (V), likewise with rows as channels."""
    return gl.DistributedLinearLayout(
        [
            [0, 0, 0, 0, 1],
            [1, 0, 0, 0, 0],
            *[[0, 0, 1 << i, 0, 0] for i in range(groups.bit_length() - 1)],
            *[[1 << i, 0, 0, 0, 0] for i in range(1, blocks.bit_length() - 1)],
        ],
        [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0], [0, 4, 0, 0, 0]],
        [], [], [blocks, 8, groups, 4, 2],
    )  # fmt: skip


@gluon.jit
def _exponent(i):
    """Power of two that bit i alone encodes in bfloat16 (bit 15 is read from bit 14)."""
    normal = gl.where(i > 13, 1, 0)
    e = i - 133
    e = gl.where(i == 7, -126, e)
    e = gl.where(i == 8, -125, e)
    e = gl.where(i == 9, -123, e)
    e = gl.where(i == 10, -119, e)
    e = gl.where(i == 11, -111, e)
    e = gl.where(i == 12, -95, e)
    e = gl.where(i == 13, -63, e)
    return gl.where(normal > 0, 1, e)


@gluon.jit
def _pow2(e):
    """2**e as float32 for -126 <= e <= 127."""
    return ((e + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _unpack(word, mask):
    """Two bfloat16 numbers a register: word & mask."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $3;", "=r,r,r,r,r", [word, mask], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _transpose_8x8(x):
    """Exchange (row, column) inside every 8 x 8 block of a 16-bit accumulator fragment."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _multiply(x, y):
    """Product of bfloat16 pairs without flushing subnormals (fused add of -0, for sm_80)."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0x80008000U; fma.rn.bf16x2 $0, $1, $2, z; }", "=r,r,r", [x, y],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _load_tile(p, WORDS: gl.constexpr):
    """WORDS words of each lane, consecutive in memory: int32 [32, WORDS]."""
    L: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [1, 1], [1, 0])
    o_l = gl.arange(0, 32, gl.SliceLayout(1, L))
    o_w = gl.arange(0, WORDS, gl.SliceLayout(0, L))
    return gl.load(p + o_l[:, None] * WORDS + o_w[None, :])


@gluon.jit
def _key_masks(TOKENS: gl.constexpr, BLOCKS: gl.constexpr):
    """Mask of every bit of a half-word, constant after compilation, and whether it is bit 15."""
    L: gl.constexpr = _key_layout(TOKENS, BLOCKS)
    i = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    i = i.expand_dims(0).expand_dims(2).expand_dims(3)
    two = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L))))
    two = two.expand_dims(0).expand_dims(0).expand_dims(0)
    return gl.where(i == 15, 0x40004000, 0x00010001 << i) + 0 * two, i == 15


@gluon.jit
def _value_masks(BLOCKS: gl.constexpr, GROUPS: gl.constexpr):
    """The same for V."""
    L: gl.constexpr = _value_layout(BLOCKS, GROUPS)
    outer: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, L))
    i = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, outer)))
    i = i.expand_dims(1).expand_dims(2).expand_dims(3).expand_dims(4)
    inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, L))
    two = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, inner)))
    two = two.expand_dims(0).expand_dims(0).expand_dims(0).expand_dims(0)
    return gl.where(i == 15, 0x40004000, 0x00010001 << i) + 0 * two, i == 15


@gluon.jit
def _join_slots(words):
    """Words [8, 4, 2] of 1, 2 or 4 sub-slots as [8, 4, 2, sub-slots]; only names registers."""
    if len(words) == 4:
        even = gl.join(words[0], words[2])
        odd = gl.join(words[1], words[3])
        out = gl.join(even, odd).reshape([8, 4, 2, 4])
    elif len(words) == 2:
        out = gl.join(words[0], words[1])
    else:
        out = words[0].reshape([8, 4, 2, 1])
    return out


@gluon.jit
def _key_operand(words, A: gl.constexpr, D: gl.constexpr):
    """A operand [tokens, D] from the words [8, 4, 2 token groups] of 1, 2 or 4 sub-slots."""
    TOKENS: gl.constexpr = 16 * len(words)
    L: gl.constexpr = _key_layout(TOKENS, D // 8)
    w = _join_slots(words).permute((3, 2, 0, 1)).reshape([TOKENS, 4])
    w = gl.convert_layout(w, gl.SliceLayout(1, gl.SliceLayout(3, L)), assert_trivial=True)
    w = w.expand_dims(1).expand_dims(3)
    mask, last = _key_masks(TOKENS, D // 8)
    a = _unpack(gl.where(last, w >> 1, w), mask)
    return gl.convert_layout(a.reshape([TOKENS, D]), A, assert_trivial=True)


@gluon.jit
def _value_operand(words, A: gl.constexpr, D: gl.constexpr):
    """A operand [D channels, tokens] likewise."""
    GROUPS: gl.constexpr = 2 * len(words)
    L: gl.constexpr = _value_layout(D // 8, GROUPS)
    w = _join_slots(words).permute((0, 3, 2, 1)).reshape([8, GROUPS, 4])
    w = gl.convert_layout(w, gl.SliceLayout(0, gl.SliceLayout(4, L)), assert_trivial=True)
    w = w.expand_dims(0).expand_dims(4)
    mask, last = _value_masks(D // 8, GROUPS)
    a = _unpack(gl.where(last, w >> 1, w), mask)
    return gl.convert_layout(a.reshape([D, GROUPS * 8]), A, assert_trivial=True)


@gluon.jit
def _probabilities(s, factor, shift, B: gl.constexpr):
    """exp2(s * factor + shift): float32 for the sum, and the B operand [tokens, N]."""
    TOKENS: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    p = gl.exp2(s * factor[None, :] + shift[None, :])
    x = _transpose_8x8(p.to(gl.bfloat16))
    x = x.reshape([TOKENS // 8, 8, N // 8, 8]).permute((0, 3, 2, 1)).reshape([TOKENS, N])
    return p, gl.convert_layout(x, B, assert_trivial=True)


@gluon.jit
def _group_scores(
    words, q, bias, slot: gl.constexpr, first_slot, end_slot,
    COUNT: gl.constexpr, BITS: gl.constexpr, MMA: gl.constexpr, A: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Scores [16 COUNT, N] of sub-slots from ``slot`` on; -inf outside first_slot .. end_slot.

    Sub-slots are independent chains of products, which Triton issues in turn.  Wider codes go from
    the highest bit down: what is there is doubled before the next bit is added.
    """
    TOKENS: gl.constexpr = 16 * COUNT
    o_s = slot + gl.arange(0, TOKENS, gl.SliceLayout(1, MMA)) // 16
    inside = (o_s >= first_slot) & (o_s < end_slot)
    start = gl.where(inside[:, None], bias[None, :], float("-inf"))
    if BITS > 1:
        s = gl.zeros([TOKENS, q.shape[1]], gl.float32, MMA)
        for b in gl.static_range(BITS - 1):
            s = mma_v2(_key_operand(_pick(words, slot, COUNT, BITS - 1 - b), A, D), q, s) * 2.0
        start += s
    return mma_v2(_key_operand(_pick(words, slot, COUNT, 0), A, D), q, start)


@gluon.jit
def _pick(words, slot: gl.constexpr, COUNT: gl.constexpr, bit: gl.constexpr):
    """Words of one bit of COUNT sub-slots from ``slot`` on, as a tuple."""
    out = ()
    for h in gl.static_range(COUNT):
        out = out + (words[slot + h][bit],)
    return out


@gluon.constexpr_function
def _groups(slots):
    """(first sub-slot, number) of groups of 4, 2 and 1 that make up a page."""
    out, first = [], 0
    for size in (4, 2, 1):
        while slots - first >= size:
            out.append((first, size))
            first += size
    return tuple(out)


@gluon.constexpr_function
def _group_first(slots, i):
    return _groups(slots)[i][0]


@gluon.constexpr_function
def _group_size(slots, i):
    return _groups(slots)[i][1]


@gluon.constexpr_function
def _num_groups(slots):
    return len(_groups(slots))


@gluon.jit
def _load_words(p, D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr):
    """Words of a part: for each sub-slot, for each bit, int32 [8 rows, 4 columns, 2 token groups].

    Bit i of a half-word is plane block i.  With 64 channels a word holds two sets of 8 plane blocks
    (two token groups, or two bits): the upper set is shifted down.
    """
    out = ()
    if D == 128 and BITS == 1:
        for t in gl.static_range(SLOTS // 2):
            w = _load_tile(p + t * 128, 4).reshape([8, 4, 2, 2]).permute((0, 1, 3, 2))
            w0, w1 = w.split()
            out = out + ((w0,), (w1,))
    elif D == 128 and BITS == 2:
        for t in gl.static_range(SLOTS):
            w0, w1 = _load_tile(p + t * 128, 4).reshape([8, 4, 2, 2]).split()
            out = out + ((w0, w1),)
    elif D == 128:
        gl.static_assert(BITS == 4)
        for t in gl.static_range(SLOTS):
            even, odd = _load_tile(p + t * 256, 8).reshape([8, 4, 2, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = out + ((w0, w1, w2, w3),)
    elif BITS == 1:
        gl.static_assert(D == 64)
        for t in gl.static_range(SLOTS // 4):
            even, odd = _load_tile(p + t * 128, 4).reshape([8, 4, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = out + (
                (gl.join(w0, w0 >> 8),), (gl.join(w1, w1 >> 8),),
                (gl.join(w2, w2 >> 8),), (gl.join(w3, w3 >> 8),),
            )  # fmt: skip
        if SLOTS % 4 == 2:
            w0, w1 = _load_tile(p + (SLOTS // 4) * 128, 2).reshape([8, 4, 2]).split()
            out = out + ((gl.join(w0, w0 >> 8),), (gl.join(w1, w1 >> 8),))
    elif BITS == 2:
        for t in gl.static_range(SLOTS // 2):
            w = _load_tile(p + t * 128, 4).reshape([8, 4, 2, 2]).permute((0, 1, 3, 2))
            w0, w1 = w.split()
            out = out + ((w0, w0 >> 8), (w1, w1 >> 8))
        if SLOTS % 2 == 1:
            w0 = _load_tile(p + (SLOTS // 2) * 128, 2).reshape([8, 4, 2])
            out = out + ((w0, w0 >> 8),)
    else:
        gl.static_assert(BITS == 4)
        for t in gl.static_range(SLOTS):
            w0, w2 = _load_tile(p + t * 128, 4).reshape([8, 4, 2, 2]).split()
            out = out + ((w0, w0 >> 8, w2, w2 >> 8),)
    return out


@gluon.jit
def _fold_max(s, MMA: gl.constexpr):
    """Largest of the sub-slots, [tokens, N] to [16, N]: no exchange between lanes."""
    x = gl.max(s.reshape([s.shape[0] // 16, 16, s.shape[1]]), 0)
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit
def _fold_min(s, MMA: gl.constexpr):
    """Smallest of the sub-slots."""
    x = gl.min(s.reshape([s.shape[0] // 16, 16, s.shape[1]]), 0)
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit
def _fold_sum(s, MMA: gl.constexpr):
    """Sum of the sub-slots."""
    x = gl.sum(s.reshape([s.shape[0] // 16, 16, s.shape[1]]), 0)
    return gl.convert_layout(x, MMA, assert_trivial=True)


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
    NUM_GROUPS: gl.constexpr = _num_groups(SLOTS)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)  # channels or tokens of an accumulator
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)  # queries

    if PDL:
        gdc_launch_dependents()  # the next launch waits for this one's results itself
    i_head = gl.program_id(0)
    i_item = gl.program_id(1)
    if i_item >= gl.load(p_plan):
        return
    req = gl.load(p_item_req + i_item)
    run_begin = gl.load(p_item_run + i_item)
    run_end = gl.load(p_item_end + i_item)
    p_run = p_runs + req.to(gl.int64) * stride_runs

    # Queries as a B operand [D, N]: plain for the bias, and with the powers of the code bits.
    o_k = gl.arange(0, D, gl.SliceLayout(1, B))
    o_n = gl.arange(0, N, gl.SliceLayout(0, B))
    p_qi = p_q + req.to(gl.int64) * stride_qt + (i_head * GROUP + o_n[None, :]) * stride_qh
    q = gl.load(p_qi + o_k[:, None], mask=(o_n < GROUP)[None, :], other=0.0).to(gl.float32)
    q_bias = (q * _pow2(0 * o_k - _SCORE_EXP)[:, None]).to(gl.bfloat16)
    weight = _pow2(-_SCORE_EXP - 4 - _exponent(o_k // 8)) * 16.0
    q_code = (q * weight[:, None]).to(gl.bfloat16)

    o_c = gl.arange(0, N, COLUMN)
    o_d = gl.arange(0, D, ROW)
    m_c = o_c < GROUP
    o_h = i_head * GROUP + o_c
    unit = scale * _LOG2E * 1073741824.0  # 2**_SCORE_EXP: accumulators to log2 of a probability
    factor = gl.zeros([N], gl.float32, COLUMN) + unit
    shift = gl.zeros([N], gl.float32, COLUMN)
    if MODE == 2:
        low = gl.full([N], float("inf"), gl.float32, COLUMN)
        high = gl.full([N], float("-inf"), gl.float32, COLUMN)
        if PDL:
            gdc_wait()  # for the extremes
        for i_other in range(gl.load(p_item_start + req), gl.load(p_item_start + req + 1)):
            low = gl.minimum(low, gl.load(p_low + i_other * NUM_HEADS + o_h, mask=m_c, other=0.0))
            high = gl.maximum(
                high, gl.load(p_high + i_other * NUM_HEADS + o_h, mask=m_c, other=0.0)
            )
        width = high - low
        some = width > 0
        slope = gl.maximum((high - tau_max) - (low - tau_min), 0.0) / gl.where(some, width, 1.0)
        # Not exactly 0: the masked scores are -inf and must stay so.
        slope = gl.maximum(gl.where(some, slope, 0.0), 1e-30)
        top = low - tau_min + width * slope  # the largest calibrated score
        factor = factor * slope
        shift = _P_EXP - high * slope * _LOG2E
    low = gl.full([N], float("inf"), gl.float32, COLUMN)
    high = gl.full([N], float("-inf"), gl.float32, COLUMN)
    m_i = gl.full([N], float("-inf"), gl.float32, COLUMN)
    l_i = gl.zeros([N], gl.float32, COLUMN)
    acc = gl.zeros([D, N], gl.float32, MMA)
    v_weight = _pow2(-_exponent(o_d // 8) - _P_EXP)

    # Keys and their ranges are loaded a page ahead, while the values of a page are used.
    o_a = gl.arange(0, D, gl.SliceLayout(0, A))
    first = gl.load(p_run + run_begin * 2)
    last_slot = gl.load(p_run + run_begin * 2 + 1)
    base = (first & _PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
    k_words = _load_words(p_words + base // 2, D, BITS, SLOTS)
    k_scale = gl.load(p_cache + base + RANGE_OFFSET + o_k)
    k_low = gl.load(p_cache + base + RANGE_OFFSET + D + o_a)
    for i_run in range(run_begin, run_end):
        end_slot = last_slot + 1
        first_slot = (first >> _TAG) - 1
        p_page = p_words + base // 2
        p_range = p_cache + base + RANGE_OFFSET
        ahead = gl.minimum(i_run + 1, run_end - 1)
        first = gl.load(p_run + ahead * 2)
        last_slot = gl.load(p_run + ahead * 2 + 1)
        base = (first & _PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
        if MODE != 1:
            v_words = _load_words(p_page + SLOTS * (BITS * D // 2), D, BITS, SLOTS)
            v_scale = gl.load(p_range + 2 * D + o_d)
            v_low = gl.load(p_range + 3 * D + o_d)
        rows, _ = gl.broadcast(k_low.to(gl.bfloat16)[None, :], gl.zeros([16, D], gl.bfloat16, A))
        bias = mma_v2(rows, q_bias, gl.zeros([16, N], gl.float32, MMA))
        bias = gl.max(bias, 0)  # all rows are equal
        qs = _multiply(q_code, k_scale.to(gl.bfloat16)[:, None])
        scores = ()
        for g in gl.static_range(NUM_GROUPS):
            scores = scores + (
                _group_scores(
                    k_words, qs, bias, _group_first(SLOTS, g), first_slot, end_slot,
                    _group_size(SLOTS, g), BITS, MMA, A, D,
                ),
            )  # fmt: skip
        k_words = _load_words(p_words + base // 2, D, BITS, SLOTS)
        k_scale = gl.load(p_cache + base + RANGE_OFFSET + o_k)
        k_low = gl.load(p_cache + base + RANGE_OFFSET + D + o_a)
        if MODE == 1:
            top_tile = _fold_max(scores[0], MMA)
            low_tile = gl.full([16, N], float("inf"), gl.float32, MMA)
            for t in gl.static_range(NUM_GROUPS):
                s = scores[t]
                top_tile = gl.maximum(top_tile, _fold_max(s, MMA))
                s = gl.where(s == float("-inf"), float("inf"), s)
                low_tile = gl.minimum(low_tile, _fold_min(s, MMA))
            high = gl.maximum(high, gl.max(top_tile, 0))
            low = gl.minimum(low, gl.min(low_tile, 0))
        else:
            alpha = gl.full([N], 1.0, gl.float32, COLUMN)
            if MODE == 0:
                top_tile = _fold_max(scores[0], MMA)
                for t in gl.static_range(1, NUM_GROUPS):
                    top_tile = gl.maximum(top_tile, _fold_max(scores[t], MMA))
                m_new = gl.maximum(m_i, gl.max(top_tile, 0) * unit)
                alpha = gl.exp2(m_i - m_new)
                m_i = m_new
                shift = _P_EXP - m_new
            p_sum = gl.zeros([16, N], gl.float32, MMA)
            page = gl.zeros([D, N], gl.float32, MMA)
            weights = ()
            for g in gl.static_range(NUM_GROUPS):
                p, b = _probabilities(scores[g], factor, shift, B)
                p_sum += _fold_sum(p, MMA)
                weights = weights + (b,)
            for bit in gl.static_range(BITS):
                if bit > 0:
                    page = page * 2.0
                for g in gl.static_range(NUM_GROUPS):
                    words = _pick(
                        v_words, _group_first(SLOTS, g), _group_size(SLOTS, g), BITS - 1 - bit
                    )
                    page = mma_v2(_value_operand(words, A, D), weights[g], page)
            total = gl.sum(p_sum, 0) * 7.888609052210118e-31  # 2**-_P_EXP
            l_i = l_i * alpha + total
            acc = acc * alpha[None, :] + page * (v_scale.to(gl.float32) * v_weight)[:, None]
            acc += v_low.to(gl.float32)[:, None] * total[None, :]

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
            lse = m_i / _LOG2E + gl.log(total)
        out = acc / total[None, :]
        gl.store(p_out + at[None, :] * D + o_d[:, None], out, mask=m_c[None, :])
        gl.store(p_lse + at, lse, mask=m_c)
