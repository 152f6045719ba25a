"""Store in Gluon: a part of a page is read once, and its codes are packed in registers.

For 64 or 128 channels of equal width (1, 2 or 4 bits).  A *visual* program packs K or V of one
(visual page, KV head).  Its tokens are copied to shared memory, 16 bytes a thread, all in flight at
once; a first pass over shared memory finds the extremes of each channel, a second one makes codes.
Numbers stay in pairs: a 32-bit word holds two neighbouring channels of a token, and minimum,
maximum and comparison take both at once.

For the second pass a lane holds, for token ``l // 4`` of a token group, the words ``l % 4`` of all
plane blocks: channels ``8 i + 2 (l % 4)`` and the next.  With one bit a code is a comparison with a
threshold of the channel, ``0xFFFF`` or 0 in each half-word, so that ``& (0x00010001 << i)`` puts it
where the page wants it and a lane ends with its own word of the K codes (format.py).  The word of
the V codes is the transpose of the 8 x 8 half-words of a warp, which is what ``movmatrix`` does.

Wider codes are found in 32-bit arithmetic, replace the numbers in shared memory, and are taken
apart bit by bit in the same way.

A *text* program copies rows to their slots and scrubs, as in :mod:`csrc_triton.store`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .fragments import PAGE_MASK
from .gluon_compat import async_load

_ROUND = gl.constexpr(12582912.0)


@gluon.constexpr_function
def column_layout(words, num_warps):
    """[rows, words]: 16 bytes of a row a thread, rows contiguous over lanes."""
    return gl.BlockedLayout([1, 4], [128 // words, words // 4], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def fragment_layout(words, num_warps):
    """[rows, words]: a warp has 8 rows, a lane the words ``l % 4 + 4 i`` of row ``l // 4``."""
    return gl.DistributedLinearLayout(
        [[0, 4 << i] for i in range((words // 4).bit_length() - 1)],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[8 << i, 0] for i in range(num_warps.bit_length() - 1)],
        [], [8 * num_warps, words],
    )  # fmt: skip


@gluon.jit
def _pairwise(x, y, asm: gl.constexpr):
    """Minimum or maximum of pairs of 16-bit numbers."""
    return gl.inline_asm_elementwise(asm, "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def extremes(low_a, high_a, low_b, high_b):
    """Smaller and larger of two pairs of bfloat16 each."""
    low = _pairwise(low_a, low_b, "min.bf16x2 $0, $1, $2;")
    return low, _pairwise(high_a, high_b, "max.bf16x2 $0, $1, $2;")


@gluon.jit
def half_extremes(low_a, high_a, low_b, high_b):
    """The same for float16."""
    low = _pairwise(low_a, low_b, "min.f16x2 $0, $1, $2;")
    return low, _pairwise(high_a, high_b, "max.f16x2 $0, $1, $2;")


@gluon.jit
def _beyond(x, limit, HALF: gl.constexpr, HOPPER: gl.constexpr):
    """0xFFFF in each half-word whose number is greater than its limit."""
    if HALF:
        asm: gl.constexpr = "set.gt.u32.f16x2 $0, $1, $2;"
    elif HOPPER:
        asm: gl.constexpr = "set.gt.u32.bf16x2 $0, $1, $2;"
    else:
        # The sign of limit - x, which no rounding changes, spread over its half-word.
        asm: gl.constexpr = (
            "{ .reg .b32 d, m; mov.b32 m, 0xBF80BF80U; fma.rn.bf16x2 d, $1, m, $2;"
            " prmt.b32 $0, d, d, 0xBB99; }"
        )
    return gl.inline_asm_elementwise(
        asm, "=r,r,r", [x, limit], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def transpose_8x8(x):
    """Exchange rows and columns of the 8 x 8 half-words that the lanes of a warp hold."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def divide(x, y):
    """Quotient in float32, rounded to nearest."""
    return gl.inline_asm_elementwise(
        "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def number(bits, DTYPE: gl.constexpr):
    """The 16-bit number in the low half of a word, as float32."""
    return bits.to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)


@gluon.jit
def _bits(x):
    """A 16-bit number as an integer, sign-extended."""
    return x.to(gl.int16, bitcast=True).to(gl.int32)


@gluon.jit
def _neighbour(bits, step: gl.constexpr):
    """The next 16-bit number up or down; flipping the low 15 bits of negative ones orders them."""
    key = (bits ^ ((bits >> 15) & 0x7FFF)) + step
    return key ^ ((key >> 15) & 0x7FFF)


@gluon.jit
def _threshold(scale, offset, DTYPE: gl.constexpr):
    """Bits of the largest 16-bit x whose code is 0: ``(x - offset) / scale <= 1/2`` in float32.

    That is ``x - offset <= scale / 2``, the difference rounded to float32.  It is next to ``offset
    + scale / 2``, unless that is 0: then the difference hides every x below half a unit in its last
    place.
    """
    half = 0.5 * scale
    middle = offset + half
    near = _bits(middle.to(DTYPE))
    above = _neighbour(near, 1)
    found = gl.where(number(near, DTYPE) - offset <= half, near, _neighbour(near, -1))
    found = gl.where(number(above, DTYPE) - offset <= half, above, found)
    hidden = (half.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    found = gl.where(middle == 0, _bits((hidden * 5.960464477539063e-08).to(DTYPE)), found)
    infinity = _bits((0 * scale + float("inf")).to(DTYPE))
    return gl.where(scale > 0, found, infinity)


@gluon.jit
def wide_code(x, scale, offset, inverse, levels, MASK: gl.constexpr):
    """Nearest level of ``(x - offset) / scale``, halves to the even one; int32.

    The rounded inverse of a scale may miss a level by one next to a half; the remainder, which is
    exact there, tells.  MASK has the bits of ``levels`` at least.
    """
    distance = x - offset
    steps = distance * inverse
    whole = (steps + _ROUND) - _ROUND
    rest = distance - whole * scale
    size = gl.maximum(rest, -rest)
    odd = ((whole + _ROUND).to(gl.int32, bitcast=True) & 1) == 1
    missed = (size > 0.5 * scale) | (odd & (size == 0.5 * scale))
    whole = gl.where(missed, whole + gl.where(rest > 0, 1.0, -1.0), whole)
    whole = gl.minimum(gl.maximum(whole, 0.0), levels)
    return (whole + _ROUND).to(gl.int32, bitcast=True) & MASK


@gluon.jit
def split_words(words):
    """Channels of words that hold two each: [W] to [2 W] words with a channel in the low half."""
    return gl.join(words & 0xFFFF, words >> 16).reshape([2 * words.shape[0]])


@gluon.jit
def _halves(x, NUM_WARPS: gl.constexpr):
    """Numbers [D] of channels as those of the low and of the high halves of words."""
    pairs: gl.constexpr = gl.BlockedLayout([2], [32], [NUM_WARPS], [0])
    return gl.convert_layout(x, pairs).reshape([x.shape[0] // 2, 2]).split()


@gluon.jit
def spread(x, COLUMNS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The same, for all rows."""
    low, high = _halves(x, NUM_WARPS)
    layout: gl.constexpr = gl.SliceLayout(0, COLUMNS)
    return (
        gl.convert_layout(low, layout).expand_dims(0),
        gl.convert_layout(high, layout).expand_dims(0),
    )


@gluon.jit
def _unit(codes, bit: gl.constexpr, BITS: gl.constexpr):
    """One bit of a token group, [rows, W] to [rows, 4]: plane block i goes to bit i of its half."""
    R: gl.constexpr = codes.shape[0]
    BLOCKS: gl.constexpr = codes.shape[1] // 4
    x = codes.reshape([R, BLOCKS, 4])
    inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout))
    i = gl.arange(0, BLOCKS, inner).expand_dims(0).expand_dims(2)
    mask = 0x00010001 << i
    if BITS == 1:
        x = x & mask
    else:
        x = ((x >> bit) << i) & mask
    return gl.reduce_or(x, 1)


@gluon.jit
def _store_words(
    words, p_words, chunk: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    SLOTS: gl.constexpr, FULL: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Store four units of 4 / BITS token groups, [rows, 4] each: 16 or 8 bytes a lane."""
    CHUNK: gl.constexpr = D // 32
    UNITS: gl.constexpr = 128 // D  # in a word
    if CHUNK == 4:
        x = gl.join(gl.join(words[0], words[2]), gl.join(words[1], words[3]))
    else:
        x = gl.join(words[0] | (words[1] << 8), words[2] | (words[3] << 8))
    ROWS: gl.constexpr = 8 * NUM_WARPS
    x = x.reshape([ROWS, 4, CHUNK])
    L: gl.constexpr = gl.BlockedLayout([1, 1, CHUNK], [8, 4, 1], [NUM_WARPS, 1, 1], [2, 1, 0])
    x = gl.convert_layout(x, L, assert_trivial=True)
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, L))).expand_dims(1).expand_dims(2)
    o_j = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, L))).expand_dims(0).expand_dims(2)
    o_c = gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(1, L))).expand_dims(0).expand_dims(1)
    lane = (o_r % 8) * 4 + o_j
    group = 4 * (o_r // 8) + chunk * (4 // BITS)
    tile = group // (2 * FULL)
    unit = (group - tile * (2 * FULL)) * BITS
    lane_words = BITS * D // 64 * FULL
    if SLOTS % FULL > 0:
        lane_words = BITS * D // 64 * gl.minimum(FULL, SLOTS - tile * FULL)
    at = tile * (FULL * BITS * D // 2) + lane * lane_words + unit // UNITS + o_c
    gl.store(p_words + at, x, mask=group < 2 * SLOTS)


@gluon.jit
def fetch_rows(n, p_rows, p_x, stride_xt, o_r, o_w, SLOTS: gl.constexpr):
    """Begin to copy the rows of a page, as words, into four buffers.

    Warp w has tokens 32 w .. 32 w + 31, buffer g their group g.  Rows without a token repeat the
    page's first one, which changes no extreme.
    """
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    first = gl.load(p_rows)
    rows = ()
    for g in gl.static_range(4):
        token = 32 * (o_r // 8) + 8 * g + o_r % 8
        row = gl.load(p_rows + gl.minimum(token, SLOTS * 16 - 1))
        rows = rows + (gl.where(token < n, row, first),)
    buffers = ()
    for g in gl.static_range(4):
        buffer = gl.allocate_shared_memory(gl.int32, [o_r.shape[0], o_w.shape[0]], SHARED)
        row = rows[g].to(gl.int64)
        async_load(buffer, p_x + row[:, None] * stride_xt + o_w[None, :])
        async_copy.commit_group()
        buffers = buffers + (buffer,)
    return buffers


@gluon.jit
def _store_part(
    n, p_rows, p_x, stride_xt, p_words, p_ranges, p_clip, p_mix, transposed,
    D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr, FULL: gl.constexpr,
    DTYPE: gl.constexpr, HOPPER: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Ranges and codes of K or V of one (page, KV head); ``p_x`` points to words of row 0."""
    HALF: gl.constexpr = DTYPE == gl.float16  # noqa: SIM300
    LEVELS: gl.constexpr = (1 << BITS) - 1
    W: gl.constexpr = D // 2
    ROWS: gl.constexpr = 8 * NUM_WARPS
    COLUMNS: gl.constexpr = column_layout(W, NUM_WARPS)
    FRAGMENT: gl.constexpr = fragment_layout(W, NUM_WARPS)
    CHANNELS: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])

    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, COLUMNS))
    o_w = gl.arange(0, W, gl.SliceLayout(0, COLUMNS))
    buffers = fetch_rows(n, p_rows, p_x, stride_xt, o_r, o_w, SLOTS)

    for g in gl.static_range(4):
        async_copy.wait_group(3 - g)
        x = buffers[g].load(COLUMNS)
        if g == 0:
            low, high = x, x
        elif HALF:
            low, high = half_extremes(low, high, x, x)
        else:
            low, high = extremes(low, high, x, x)
    if HALF:
        low, high = gl.reduce((low, high), 0, half_extremes)
    else:
        low, high = gl.reduce((low, high), 0, extremes)
    low = number(gl.convert_layout(split_words(low), CHANNELS), DTYPE)
    high = number(gl.convert_layout(split_words(high), CHANNELS), DTYPE)
    o_d = gl.arange(0, D, CHANNELS)
    clip = gl.load(p_clip + o_d)
    mix = gl.load(p_mix + o_d)
    bottom = low * clip + high * mix
    extent = (low * mix + high * clip) - bottom
    if BITS > 1:
        extent = divide(extent, gl.full([D], LEVELS, gl.float32, CHANNELS))
    gl.store(p_ranges + o_d, extent.to(DTYPE))
    gl.store(p_ranges + D + o_d, bottom.to(DTYPE))
    scale = extent.to(DTYPE).to(gl.float32)
    offset = bottom.to(DTYPE).to(gl.float32)

    if BITS == 1:
        low, high = _halves(_threshold(scale, offset, DTYPE), NUM_WARPS)
        limit = gl.convert_layout((low & 0xFFFF) | (high << 16), gl.SliceLayout(0, FRAGMENT))
        limit = limit.expand_dims(0)
    else:
        scale = gl.where(scale > 0, scale, 1e38)  # a constant channel: all codes are 0
        inverse = divide(0 * scale + 1.0, scale)
        scale_low, scale_high = spread(scale, COLUMNS, NUM_WARPS)
        offset_low, offset_high = spread(offset, COLUMNS, NUM_WARPS)
        inverse_low, inverse_high = spread(inverse, COLUMNS, NUM_WARPS)
        for g in gl.static_range(4):
            x = buffers[g].load(COLUMNS)
            a = wide_code(number(x, DTYPE), scale_low, offset_low, inverse_low, LEVELS, LEVELS)
            b = wide_code(
                number(x >> 16, DTYPE), scale_high, offset_high, inverse_high, LEVELS, LEVELS
            )
            buffers[g].store(a | (b << 16))

    units = ()
    for g in gl.static_range(4):
        x = buffers[g].load(FRAGMENT)
        if BITS == 1:
            x = _beyond(x, limit, HALF, HOPPER)
        for b in gl.static_range(BITS):
            unit = _unit(x, b, BITS)
            o_t = gl.arange(0, ROWS, gl.SliceLayout(1, unit.type.layout))
            inside = 32 * (o_t // 8) + 8 * g + o_t % 8 < n
            unit = gl.where(inside.expand_dims(1), unit, 0)
            units = units + (gl.where(transposed, transpose_8x8(unit), unit),)
        if len(units) == 4:
            _store_words(units, p_words, (g * BITS) // 4, D, BITS, SLOTS, FULL, NUM_WARPS)
            units = ()


@gluon.jit
def store_text(
    i_tile, first_head, head_step, num_heads, p_key, p_value, stride_kt, stride_kh, stride_vt,
    stride_vh, p_words, stride_page, stride_head, p_slot_mapping, num_tokens,
    W: gl.constexpr, BR: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Copy BR rows of some heads to their slots and scrub the blocks that they begin."""
    L: gl.constexpr = column_layout(W, NUM_WARPS)
    o_r = i_tile * BR + gl.arange(0, BR, gl.SliceLayout(1, L))
    o_w = gl.arange(0, W, gl.SliceLayout(0, L))[None, :]
    slot = gl.load(p_slot_mapping + o_r, mask=o_r < num_tokens, other=-1).to(gl.int32)
    text = (slot >= 0) & ((slot >> 4) <= PAGE_MASK)
    if gl.max(text.to(gl.int32), 0) > 0:
        p_slot = p_words + (slot >> 4).to(gl.int64) * stride_page + (slot & 15) * (2 * W)
        p_k = p_key + o_r.to(gl.int64)[:, None] * stride_kt + o_w
        p_v = p_value + o_r.to(gl.int64)[:, None] * stride_vt + o_w
        for i_head in range(first_head, num_heads, head_step):
            p_row = p_slot[:, None] + (i_head * stride_head + o_w)
            k = gl.load(p_k + i_head * stride_kh, mask=text[:, None], other=0)
            v = gl.load(p_v + i_head * stride_vh, mask=text[:, None], other=0)
            gl.store(p_row, k, mask=text[:, None])
            gl.store(p_row + W, v, mask=text[:, None])
        begins = text & ((slot & 15) == 0)
        gap = gl.zeros([BR], gl.int32, gl.SliceLayout(1, L))
        for j in gl.static_range(1, 16):
            m = begins & (o_r + j < num_tokens)
            ahead = gl.load(p_slot_mapping + o_r + j, mask=m, other=-1).to(gl.int32)
            gap = gap | ((begins & (ahead != slot + j)).to(gl.int32) << j)
        if gl.max(gap, 0) > 0:
            zero = gl.zeros([BR, W], gl.int32, L)
            for i_head in range(first_head, num_heads, head_step):
                p_row = p_slot[:, None] + (i_head * stride_head + o_w)
                for i_row in range(1, 16):
                    missing = (((gap >> i_row) & 1) == 1)[:, None]
                    gl.store(p_row + i_row * (2 * W), zero, mask=missing)
                    gl.store(p_row + i_row * (2 * W) + W, zero, mask=missing)


# One compilation for all steps: what changes from step to step is not specialised.
@gluon.jit(do_not_specialize=["num_tokens", "num_visual", "text_head_step"])
def _store_kernel(
    p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh,
    p_cache, p_words, stride_page, stride_head, p_slot_mapping, num_tokens, num_heads,
    num_visual, text_head_step, p_plan, p_page_ids, p_page_tokens, p_page_rows,
    p_key_clip, p_value_clip, p_key_mix, p_value_mix,
    D: gl.constexpr, BITS: gl.constexpr, SLOTS: gl.constexpr, FULL: gl.constexpr,
    RANGE_OFFSET: gl.constexpr, BR: gl.constexpr, HOPPER: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Visual programs first: (page, part, head), heads fastest.  All strides count words."""
    i = gl.program_id(0)
    num_programs = 2 * num_visual * num_heads
    if i >= num_programs:
        i -= num_programs
        store_text(
            i // text_head_step, i % text_head_step, text_head_step, num_heads,
            p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh, p_words, stride_page,
            stride_head, p_slot_mapping, num_tokens, D // 2, BR, NUM_WARPS,
        )  # fmt: skip
    else:
        i_head = i % num_heads
        part = (i // num_heads) % 2
        is_value = part == 1
        p_x = gl.where(is_value, p_value, p_key)
        stride_xt = gl.where(is_value, stride_vt, stride_kt)
        p_x += i_head * gl.where(is_value, stride_vh, stride_kh)
        p_clip = gl.where(is_value, p_value_clip, p_key_clip)
        p_mix = gl.where(is_value, p_value_mix, p_key_mix)
        for i_page in range(i // (2 * num_heads), gl.load(p_plan + 2), num_visual):
            page = gl.load(p_page_ids + i_page).to(gl.int64)
            base = page * stride_page + i_head * stride_head
            _store_part(
                gl.load(p_page_tokens + i_page), p_page_rows + i_page * (SLOTS * 16),
                p_x, stride_xt, p_words + base + part * (SLOTS * BITS * D // 2),
                p_cache + 2 * base + RANGE_OFFSET + part * (2 * D), p_clip, p_mix, is_value,
                D, BITS, SLOTS, FULL, p_cache.dtype.element_ty, HOPPER, NUM_WARPS,
            )  # fmt: skip
