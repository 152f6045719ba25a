"""Code words of visual pages as mma operands, without leaving registers (Gluon).

In a page each lane owns whole 32-bit words whose order is that of the A operand of
``mma.m16n8k16`` (format.py).  With the queries of a KV head as N = 8 (or 16) columns,

* scores: A = K codes, rows are the 16 tokens of a sub-slot, columns are channels; B = q * s_K;
* output: A = V codes, rows are channels, columns are tokens; B = P.

``word & (0x00010001 << i)`` is an A register: two bfloat16 numbers that are 0 or the power of two
``2**EXPONENT[i]`` whose encoding is bit i alone.  Bit 15 is the sign: ``word & 0x80008000 |
0x3F803F80`` is 1 or -1, and a code bit is ``(1 - v) / 2``.  One LOP3 unpacks two codes.  The power
depends on the channel block only, so it folds into q * s_K for the scores and into s_V for the
output.  Exponents reach 2**-133, hence the common factors ``2**-SCORE_EXP`` on scores and
``2**P_EXP`` on P that keep every product a normal number; nothing on the way flushes subnormals to
zero.

The softmax probabilities leave the scores' accumulator as (token, query) and enter the second
product as (query, token): ``movmatrix`` transposes an 8 x 8 block of 16-bit numbers inside the
warp.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from vllm_calibquant.attention.reference import LEAST_EXTENT
from vllm_calibquant.tags import TAG_SHIFT

from .gluon_compat import async_load
from .tables import SCORE_EXP as _SCORE_EXP

TAG = gl.constexpr(TAG_SHIFT)
PAGE_MASK = gl.constexpr((1 << TAG_SHIFT) - 1)
SCORE_EXP = gl.constexpr(_SCORE_EXP)
SCORE_UNIT = gl.constexpr(2.0**-_SCORE_EXP)
P_EXP = gl.constexpr(100)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def key_layout(tokens, blocks):
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
def value_layout(blocks, groups):
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
def exponent(i):
    """Power of two that bit i alone encodes in bfloat16; 0 for the sign, bit 15."""
    e = i - 133
    e = gl.where(i == 7, -126, e)
    e = gl.where(i == 8, -125, e)
    e = gl.where(i == 9, -123, e)
    e = gl.where(i == 10, -119, e)
    e = gl.where(i == 11, -111, e)
    e = gl.where(i == 12, -95, e)
    e = gl.where(i == 13, -63, e)
    e = gl.where(i == 14, 1, e)
    return gl.where(i == 15, 0, e)


@gluon.jit
def pow2(e):
    """2**e as float32 for -126 <= e <= 127."""
    return ((e + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def unpack(word, mask, one):
    """Two bfloat16 numbers a register: word & mask | one."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $3, $5, 0xEA;", "=r,r,r,r,r,r,r", [word, mask, one],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def transpose_8x8(x):
    """Exchange (row, column) inside every 8 x 8 block of a 16-bit accumulator fragment."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def multiply(x, y):
    """Product of bfloat16 pairs without flushing subnormals (fused add of -0, for sm_80)."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0x80008000U; fma.rn.bf16x2 $0, $1, $2, z; }", "=r,r,r", [x, y],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def multiply_again(x, y):
    """The same, but done where it is written: not kept in registers across the loop."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 z; mov.b32 z, 0x80008000U; fma.rn.bf16x2 $0, $1, $2, z; }", "=r,r,r", [x, y],
        dtype=gl.bfloat16, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def key_masks(TOKENS: gl.constexpr, BLOCKS: gl.constexpr):
    """Mask of every bit of a half-word, and what is added to bit 15; constant when compiled."""
    L: gl.constexpr = key_layout(TOKENS, BLOCKS)
    i = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    i = i.expand_dims(0).expand_dims(2).expand_dims(3)
    two = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L))))
    two = two.expand_dims(0).expand_dims(0).expand_dims(0)
    return (0x00010001 << i) + 0 * two, gl.where(i == 15, 0x3F803F80, 0) + 0 * two


@gluon.jit
def value_masks(BLOCKS: gl.constexpr, GROUPS: gl.constexpr):
    """The same for V."""
    L: gl.constexpr = value_layout(BLOCKS, GROUPS)
    outer: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, L))
    i = gl.arange(0, BLOCKS, gl.SliceLayout(1, gl.SliceLayout(2, outer)))
    i = i.expand_dims(1).expand_dims(2).expand_dims(3).expand_dims(4)
    inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, L))
    two = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, inner)))
    two = two.expand_dims(0).expand_dims(0).expand_dims(0).expand_dims(0)
    return (0x00010001 << i) + 0 * two, gl.where(i == 15, 0x3F803F80, 0) + 0 * two


@gluon.jit
def join_slots(words):
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
def key_operand(words, A: gl.constexpr, D: gl.constexpr):
    """A operand [tokens, D] from the words [8, 4, 2 token groups] of 1, 2 or 4 sub-slots."""
    TOKENS: gl.constexpr = 16 * len(words)
    L: gl.constexpr = key_layout(TOKENS, D // 8)
    w = join_slots(words).permute((3, 2, 0, 1)).reshape([TOKENS, 4])
    w = gl.convert_layout(w, gl.SliceLayout(1, gl.SliceLayout(3, L)), assert_trivial=True)
    w = w.expand_dims(1).expand_dims(3)
    mask, one = key_masks(TOKENS, D // 8)
    a = unpack(w + 0 * mask, mask, one)
    return gl.convert_layout(a.reshape([TOKENS, D]), A, assert_trivial=True)


@gluon.jit
def value_operand(words, A: gl.constexpr, D: gl.constexpr):
    """A operand [D channels, tokens] likewise."""
    GROUPS: gl.constexpr = 2 * len(words)
    L: gl.constexpr = value_layout(D // 8, GROUPS)
    w = join_slots(words).permute((0, 3, 2, 1)).reshape([8, GROUPS, 4])
    w = gl.convert_layout(w, gl.SliceLayout(0, gl.SliceLayout(4, L)), assert_trivial=True)
    w = w.expand_dims(0).expand_dims(4)
    mask, one = value_masks(D // 8, GROUPS)
    a = unpack(w + 0 * mask, mask, one)
    return gl.convert_layout(a.reshape([D, GROUPS * 8]), A, assert_trivial=True)


@gluon.jit
def probabilities(s, factor, shift, B: gl.constexpr):
    """exp2(s * factor + shift): float32 for the sum, and the B operand [tokens, N]."""
    TOKENS: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    p = gl.exp2(s * factor[None, :] + shift[None, :])
    x = transpose_8x8(p.to(gl.bfloat16))
    x = x.reshape([TOKENS // 8, 8, N // 8, 8]).permute((0, 3, 2, 1)).reshape([TOKENS, N])
    return p, gl.convert_layout(x, B, assert_trivial=True)


@gluon.jit
def flushed_exp2(x):
    """2**x in one instruction; what is less than 2**-126 is 0."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def flushed_probabilities(s, factor, shift, B: gl.constexpr):
    """:func:`probabilities` by :func:`flushed_exp2`."""
    N: gl.constexpr = s.shape[1]
    p = flushed_exp2(s * factor[None, :] + shift[None, :])
    x = transpose_8x8(p.to(gl.bfloat16))
    x = x.reshape([s.shape[0] // 8, 8, N // 8, 8]).permute((0, 3, 2, 1)).reshape(s.shape)
    return p, gl.convert_layout(x, B, assert_trivial=True)


@gluon.jit
def repeat_rows(bias, COUNT: gl.constexpr, MMA: gl.constexpr):
    """Equal rows [16, N] as the accumulator [16 COUNT, N] that scores start from."""
    N: gl.constexpr = bias.shape[1]
    out = bias
    if COUNT >= 2:
        out = gl.join(out, out).permute((2, 0, 1)).reshape([32, N])
    if COUNT == 4:
        out = gl.join(out, out).permute((2, 0, 1)).reshape([64, N])
    return gl.convert_layout(out, MMA, assert_trivial=True)


@gluon.jit
def group_scores(
    words, q, bias,
    COUNT: gl.constexpr, BITS: gl.constexpr, MMA: gl.constexpr, A: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Scores [16 COUNT, N] of COUNT sub-slots; ``bias`` [16, N] has equal rows.

    Sub-slots are independent chains of products, which Triton issues in turn.  Wider codes go from
    the highest bit down: what is there is doubled before the next bit is added.
    """
    TOKENS: gl.constexpr = 16 * COUNT
    N: gl.constexpr = q.shape[1]
    start = repeat_rows(bias, COUNT, MMA)
    if BITS > 1:
        s = gl.zeros([TOKENS, N], gl.float32, MMA)
        for b in gl.static_range(BITS - 1):
            s = mma_v2(key_operand(bit(words, BITS - 1 - b), A, D), q, s) * 2.0
        start += s
    return mma_v2(key_operand(bit(words, 0), A, D), q, start)


@gluon.jit
def group_output(
    words, p, out, BITS: gl.constexpr, A: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Add the products of V codes and probabilities to ``out`` [D, N]."""
    if BITS > 1:
        high = gl.zeros_like(out)
        for b in gl.static_range(BITS - 1):
            high = mma_v2(value_operand(bit(words, BITS - 1 - b), A, D), p, high) * 2.0
        out += high
    return mma_v2(value_operand(bit(words, 0), A, D), p, out)


@gluon.jit
def bit(words, bit: gl.constexpr):
    """One bit of the words of some sub-slots, as a tuple."""
    out = ()
    for h in gl.static_range(len(words)):
        out = out + (words[h][bit],)
    return out


@gluon.jit
def run_slots(first, last_slot, i_run, begin, end, HALF: gl.constexpr):
    """First sub-slot of run i_run and the one after its last, within half runs begin .. end - 1.

    ``first`` is the run's first tagged id, and half run ``2 i + 1`` begins at sub-slot HALF.
    """
    first_slot = (first >> TAG) - 1
    end_slot = last_slot + 1
    if i_run * 2 < begin:
        first_slot = gl.maximum(first_slot, HALF)
    if i_run * 2 + 2 > end:
        end_slot = gl.minimum(end_slot, HALF)
    return first_slot, end_slot


@gluon.jit
def inside(slot: gl.constexpr, COUNT: gl.constexpr, first_slot, end_slot, MMA: gl.constexpr):
    """Which of 16 COUNT tokens from sub-slot ``slot`` on lie in first_slot .. end_slot - 1."""
    o_s = slot + gl.arange(0, 16 * COUNT, gl.SliceLayout(1, MMA)) // 16
    return ((o_s >= first_slot) & (o_s < end_slot))[:, None]


@gluon.constexpr_function
def part_slots(bits, n):
    """Sub-slots of a part of a page: as many as the registers hold scores of."""
    return max(1, 64 // (bits * n))


@gluon.constexpr_function
def num_parts(slots, bits, n):
    """Parts of a page."""
    return -(-slots // part_slots(bits, n))


@gluon.constexpr_function
def groups(slots, part_slots, part):
    """(first sub-slot, number) of the groups of 4, 2 and 1 that make up a part of a page."""
    first = part * part_slots
    end = min(slots, first + part_slots)
    out = []
    for size in (4, 2, 1):
        while end - first >= size:
            out.append((first, size))
            first += size
    return tuple(out)


@gluon.constexpr_function
def num_groups(slots, part_slots, part):
    """Groups of a part."""
    return len(groups(slots, part_slots, part))


@gluon.constexpr_function
def group_first(slots, part_slots, part, i):
    """First sub-slot of a group, counted from the page's first."""
    return groups(slots, part_slots, part)[i][0]


@gluon.constexpr_function
def group_size(slots, part_slots, part, i):
    """Sub-slots of a group."""
    return groups(slots, part_slots, part)[i][1]


@gluon.jit
def fold_max(s, MMA: gl.constexpr):
    """Largest of the sub-slots, [tokens, N] to [16, N]: no exchange between lanes."""
    x = gl.max(s.reshape([s.shape[0] // 16, 16, s.shape[1]]), 0)
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit
def fold_min(s, MMA: gl.constexpr):
    """Smallest of the sub-slots."""
    x = gl.min(s.reshape([s.shape[0] // 16, 16, s.shape[1]]), 0)
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit
def fold_sum(s, MMA: gl.constexpr):
    """Sum of the sub-slots."""
    x = gl.sum(s.reshape([s.shape[0] // 16, 16, s.shape[1]]), 0)
    return gl.convert_layout(x, MMA, assert_trivial=True)


@gluon.jit
def offset_scores(q, low, MMA: gl.constexpr, A: gl.constexpr):
    """Scores of a page's offsets, in 16 equal rows, from q [D, N] and lo [D] of one dtype."""
    D: gl.constexpr = q.shape[0]
    N: gl.constexpr = q.shape[1]
    rows, _ = gl.broadcast(low[None, :], gl.zeros([16, D], low.dtype, A))
    return mma_v2(rows, q, gl.zeros([16, N], gl.float32, MMA))


@gluon.jit
def last_block_bias(qs, bias, LEVELS: gl.constexpr, A: gl.constexpr, B: gl.constexpr):
    """Add what bit 15 leaves: a code bit there is read as (1 - v) / 2 with v = 1 or -1."""
    N: gl.constexpr = qs.shape[1]
    x = qs
    for _ in gl.static_range(3):
        _, x = x.reshape([2, x.shape[0] // 2, N]).permute((1, 2, 0)).split()
    x = gl.convert_layout(x, B, assert_trivial=True)
    o_k = gl.arange(0, 16, gl.SliceLayout(0, A))
    ones = gl.where(o_k >= 8, -1.0 * LEVELS, 0.0).to(gl.bfloat16)
    rows, _ = gl.broadcast(ones[None, :], gl.zeros([16, 16], gl.bfloat16, A))
    return mma_v2(rows, x, bias)


@gluon.jit
def load_tile(page, offset: gl.constexpr, WORDS: gl.constexpr):
    """WORDS words of each lane, consecutive in shared memory: int32 [32, WORDS]."""
    L: gl.constexpr = gl.BlockedLayout([WORDS], [32], [1], [0])
    return page.slice(offset, 32 * WORDS).load(L).reshape([32, WORDS])


@gluon.jit
def fetch(
    to, p_page, VALUES: gl.constexpr, D: gl.constexpr, CODES: gl.constexpr, RANGES: gl.constexpr,
    WARPS: gl.constexpr = 1,
):  # fmt: skip
    """Start to copy K (or V) codes and ranges of a page's KV head into 8 D words of the ring."""
    L: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    o = gl.arange(0, 8 * D, L)
    o = gl.where(o < CODES, VALUES * CODES + o, RANGES + VALUES * D + (o - CODES) % D)
    o = gl.max_contiguous(gl.multiple_of(o, 4), 4)
    async_load(to, p_page + o)


@gluon.jit
def load_group(
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
            w = load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).permute((0, 1, 3, 2))
            w0, w1 = w.split()
            out = out + ((w0,), (w1,))
    elif D == 128 and BITS == 2:
        for t in gl.static_range(COUNT):
            w0, w1 = load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).split()
            out = out + ((w0, w1),)
    elif D == 128:
        gl.static_assert(BITS == 4)
        for t in gl.static_range(COUNT):
            even, odd = load_tile(page, start + t * 256, 8).reshape([8, 4, 2, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = out + ((w0, w1, w2, w3),)
    elif BITS == 1:
        gl.static_assert(D == 64 and FIRST % 4 == 0)
        if COUNT == 4:
            even, odd = load_tile(page, start, 4).reshape([8, 4, 2, 2]).split()
            w0, w2 = even.split()
            w1, w3 = odd.split()
            out = out + (
                (gl.join(w0, w0 >> 8),), (gl.join(w1, w1 >> 8),),
                (gl.join(w2, w2 >> 8),), (gl.join(w3, w3 >> 8),),
            )  # fmt: skip
        else:
            gl.static_assert(COUNT == 2)
            w0, w1 = load_tile(page, start, 2).reshape([8, 4, 2]).split()
            out = out + ((gl.join(w0, w0 >> 8),), (gl.join(w1, w1 >> 8),))
    elif BITS == 2:
        gl.static_assert(FIRST % 2 == 0)
        for t in gl.static_range(COUNT // 2):
            w = load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).permute((0, 1, 3, 2))
            w0, w1 = w.split()
            out = out + ((w0, w0 >> 8), (w1, w1 >> 8))
        if COUNT % 2 == 1:
            w0 = load_tile(page, start + (COUNT // 2) * 128, 2).reshape([8, 4, 2])
            out = out + ((w0, w0 >> 8),)
    else:
        gl.static_assert(BITS == 4)
        for t in gl.static_range(COUNT):
            w0, w2 = load_tile(page, start + t * 128, 4).reshape([8, 4, 2, 2]).split()
            out = out + ((w0, w0 >> 8, w2, w2 >> 8),)
    return out


@gluon.jit
def query_weight(o_k):
    """What channels of the query are multiplied by, so that the powers of the code bits cancel."""
    weight = pow2(-SCORE_EXP - 4 - exponent(o_k // 8)) * 16.0
    return gl.where(o_k // 8 == 15, -0.5 * weight, weight)


LEAST_SUM = gl.constexpr(2.0**-100)
"""Sum of a part's probabilities that counts as none, since 1 / sum must be a number.

With calibration they are relative to the largest score of a request, from which all of a part may
be more than 87 away; then some other part has a sum of at least 1.
"""
_LEAST_EXTENT = gl.constexpr(LEAST_EXTENT)


@gluon.jit
def calibration(low, high, tau_min, tau_max):
    """Slope of the calibrated scores between the extremes of a request, and the largest of them."""
    width = high - low
    some = width > _LEAST_EXTENT
    slope = gl.maximum((high - tau_max) - (low - tau_min), 0.0) / gl.where(some, width, 1.0)
    # Not exactly 0: the masked scores are -inf and must stay so.
    slope = gl.maximum(gl.where(some, slope, 0.0), 1e-30)
    return slope, low - tau_min + width * slope
