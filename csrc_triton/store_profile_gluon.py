"""Store of a profile's components in Gluon: any width, the tokens of a page read once.

As in :mod:`csrc_triton.store_gluon`, with the codes of wide components.  They go to scratch memory
as pairs of 16-bit numbers, and come back in the order of planes: a lane then has, for token
``l // 4`` of a token group, planes ``8 i + 2 (l % 4)`` and the next of all plane blocks i.  Both
have the same bit of neighbouring components (``DeviceFormat.key_pairs``), which is all that is left
to take out.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gluon_compat import barrier
from .profile_gluon import num_sections, section_first, section_size
from .store_gluon import (
    column_layout,
    divide,
    extremes,
    fetch_rows,
    fragment_layout,
    half_extremes,
    number,
    split_words,
    spread,
    store_text,
    transpose_8x8,
    wide_code,
)


@gluon.constexpr_function
def _full_tile(planes):
    """Sub-slots of a full tile of a section (format.py)."""
    return min(max(1, 256 // planes), 4)


@gluon.jit
def _plane_unit(codes, bit, BLOCKS: gl.constexpr):
    """Planes of a token group, [rows, W] to [rows, 4]: plane block i goes to bit i of its half."""
    R: gl.constexpr = codes.shape[0]
    x = ((codes >> bit) & 0x00010001).reshape([R, BLOCKS, 4])
    inner: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout))
    i = gl.arange(0, BLOCKS, inner).expand_dims(0).expand_dims(2)
    return gl.reduce_or(x << i, 1)


@gluon.jit
def _piece_units(
    n, p_codes, p_source, p_pairs, FIRST: gl.constexpr, SIZE: gl.constexpr, PLANES: gl.constexpr,
    D: gl.constexpr, TRANSPOSED: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Words of SIZE planes from FIRST on, [rows, 4] for each of a warp's four token groups."""
    ROWS: gl.constexpr = 8 * NUM_WARPS
    L: gl.constexpr = fragment_layout(SIZE // 2, NUM_WARPS)
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, L))
    o_w = gl.arange(0, SIZE // 2, gl.SliceLayout(0, L))
    pair = gl.load(p_pairs + FIRST // 2 + o_w)
    bit = gl.load(p_source + PLANES + FIRST + 2 * o_w)
    units = ()
    for g in gl.static_range(4):
        token = 32 * (o_r // 8) + 8 * g + o_r % 8
        m = (token < n)[:, None] & (bit >= 0)[None, :]
        x = gl.load(p_codes + token[:, None] * (D // 2) + pair[None, :], mask=m, other=0)
        unit = _plane_unit(x, gl.maximum(bit, 0)[None, :], SIZE // 8)
        if TRANSPOSED:
            unit = transpose_8x8(unit)
        units = units + (unit,)
    return units


@gluon.jit
def _store_unit(
    unit, p_words, group: gl.constexpr, SIZE: gl.constexpr, HALF: gl.constexpr,
    SLOTS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Store a word a lane: of token group ``group`` of each warp, and what shares its word."""
    L: gl.constexpr = unit.type.layout
    FULL: gl.constexpr = _full_tile(SIZE)
    o_r = gl.arange(0, 8 * NUM_WARPS, gl.SliceLayout(1, L))
    o_j = gl.arange(0, 4, gl.SliceLayout(0, L))
    slot = 2 * (o_r // 8) + group // 2
    first = slot // FULL * FULL
    count = gl.minimum(FULL, SLOTS - first)
    if FULL == 4 and SLOTS % 4 == 3:  # three sub-slots are a tile of two and one of one
        last = (count == 3) & (slot - first == 2)
        count = gl.where(count == 3, gl.where(last, 1, 2), count)
        first = gl.where(last, slot, first)
    pair = (4 * (o_r // 8) + group - 2 * first) * (SIZE // 8)
    at = first * (SIZE // 2) + (o_r % 8) * 4 * (count * SIZE // 64) + pair // 16 + HALF
    lane_words = count * SIZE // 64
    p_word = p_words + at[:, None] + o_j[None, :] * lane_words[:, None]
    gl.store(p_word, unit, mask=(slot < SLOTS)[:, None])


@gluon.jit
def _store_section(
    n, p_codes, p_source, p_pairs, p_words, SECTION: gl.constexpr, PLANES: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr, TRANSPOSED: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Code words of a section."""
    SIZE: gl.constexpr = section_size(PLANES, SECTION)
    FIRST: gl.constexpr = section_first(PLANES, SECTION)
    p_words += SLOTS * FIRST // 2
    if SIZE >= 128:
        for i in gl.static_range(SIZE // 128):
            units = _piece_units(
                n, p_codes, p_source, p_pairs, FIRST + 128 * i, 128, PLANES, D, TRANSPOSED,
                NUM_WARPS,
            )  # fmt: skip
            for g in gl.static_range(4):
                _store_unit(units[g], p_words, g, SIZE, i, SLOTS, NUM_WARPS)
    else:
        u = _piece_units(
            n, p_codes, p_source, p_pairs, FIRST, SIZE, PLANES, D, TRANSPOSED, NUM_WARPS
        )
        if SIZE == 64:
            _store_unit(u[0] | (u[1] << 8), p_words, 0, SIZE, 0, SLOTS, NUM_WARPS)
            _store_unit(u[2] | (u[3] << 8), p_words, 2, SIZE, 0, SLOTS, NUM_WARPS)
        else:
            gl.static_assert(SIZE == 32)
            word = u[0] | (u[1] << 4) | (u[2] << 8) | (u[3] << 12)
            _store_unit(word, p_words, 0, SIZE, 0, SLOTS, NUM_WARPS)


@gluon.jit
def _store_part(
    n, p_rows, p_x, stride_xt, p_words, p_ranges, p_clip, p_mix, p_levels, p_source, p_pairs,
    p_codes, D: gl.constexpr, PLANES: gl.constexpr, SLOTS: gl.constexpr,
    TRANSPOSED: gl.constexpr, DTYPE: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Ranges and codes of K or V of one (page, KV head); ``p_x`` points to words of row 0."""
    HALF: gl.constexpr = DTYPE == gl.float16  # noqa: SIM300
    W: gl.constexpr = D // 2
    ROWS: gl.constexpr = 8 * NUM_WARPS
    COLUMNS: gl.constexpr = column_layout(W, NUM_WARPS)
    CHANNELS: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])

    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, COLUMNS))
    o_w = gl.arange(0, W, gl.SliceLayout(0, COLUMNS))
    buffers = fetch_rows(n, p_rows, p_x, stride_xt, o_r, o_w, SLOTS)

    even_sum = gl.zeros([ROWS, W], gl.float32, COLUMNS)
    odd_sum = gl.zeros([ROWS, W], gl.float32, COLUMNS)
    for g in gl.static_range(4):
        async_copy.wait_group(3 - g)
        x = buffers[g].load(COLUMNS)
        real = (32 * (o_r // 8) + 8 * g + o_r % 8 < n)[:, None]
        even_sum += gl.where(real, number(x, DTYPE), 0.0)
        odd_sum += gl.where(real, number(x >> 16, DTYPE), 0.0)
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
    total = gl.join(gl.sum(even_sum, 0), gl.sum(odd_sum, 0)).reshape([D])
    total = gl.convert_layout(total, CHANNELS)
    o_d = gl.arange(0, D, CHANNELS)
    clip = gl.load(p_clip + o_d)
    mix = gl.load(p_mix + o_d)
    levels = gl.load(p_levels + o_d)
    coded = levels > 0
    bottom = low * clip + high * mix
    extent = (low * mix + high * clip) - bottom
    extent = gl.where(coded, divide(extent, gl.where(coded, levels, 1.0)), 0.0)
    bottom = gl.where(coded, bottom, divide(total, 0 * total + n.to(gl.float32)))
    gl.store(p_ranges + o_d, extent.to(DTYPE))
    gl.store(p_ranges + D + o_d, bottom.to(DTYPE))
    scale = extent.to(DTYPE).to(gl.float32)
    offset = bottom.to(DTYPE).to(gl.float32)

    scale = gl.where(scale > 0, scale, 1e38)  # a constant channel: all codes are 0
    even_scale, odd_scale = spread(scale, COLUMNS, NUM_WARPS)
    even_offset, odd_offset = spread(offset, COLUMNS, NUM_WARPS)
    even_inverse, odd_inverse = spread(divide(0 * scale + 1.0, scale), COLUMNS, NUM_WARPS)
    even_levels, odd_levels = spread(levels, COLUMNS, NUM_WARPS)
    for g in gl.static_range(4):
        x = buffers[g].load(COLUMNS)
        a = wide_code(number(x, DTYPE), even_scale, even_offset, even_inverse, even_levels, 255)
        b = wide_code(number(x >> 16, DTYPE), odd_scale, odd_offset, odd_inverse, odd_levels, 255)
        token = 32 * (o_r // 8) + 8 * g + o_r % 8
        p_token = p_codes + token[:, None] * W + o_w[None, :]
        gl.store(p_token, a | (b << 16), mask=(token < SLOTS * 16)[:, None])
    barrier()
    for i in gl.static_range(num_sections(PLANES)):
        _store_section(
            n, p_codes, p_source, p_pairs, p_words, i, PLANES, D, SLOTS, TRANSPOSED, NUM_WARPS
        )
    barrier()  # the next page has the same scratch memory


# One compilation for all steps: what changes from step to step is not specialised.
@gluon.jit(do_not_specialize=["num_tokens", "num_visual", "text_head_step"])
def _store_kernel(
    p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh,
    p_cache, p_words, stride_page, stride_head, p_slot_mapping, num_tokens, num_heads,
    num_visual, text_head_step, p_plan, p_page_ids, p_page_tokens, p_page_rows,
    p_key_clip, p_value_clip, p_key_mix, p_value_mix, p_key_levels, p_value_levels,
    p_key_source, p_value_source, p_key_pairs, p_value_pairs, p_scratch,
    D: gl.constexpr, KEY_PLANES: gl.constexpr, VALUE_PLANES: gl.constexpr, SLOTS: gl.constexpr,
    RANGE_OFFSET: gl.constexpr, BR: gl.constexpr, NUM_WARPS: gl.constexpr,
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
        p_codes = p_scratch + i.to(gl.int64) * (SLOTS * 16 * (D // 2))
        for i_page in range(i // (2 * num_heads), gl.load(p_plan + 2), num_visual):
            base = gl.load(p_page_ids + i_page).to(gl.int64) * stride_page + i_head * stride_head
            n = gl.load(p_page_tokens + i_page)
            p_rows = p_page_rows + i_page * (SLOTS * 16)
            p_ranges = p_cache + 2 * base + RANGE_OFFSET
            if (i // num_heads) % 2 == 0:
                _store_part(
                    n, p_rows, p_key + i_head * stride_kh, stride_kt, p_words + base, p_ranges,
                    p_key_clip, p_key_mix, p_key_levels, p_key_source, p_key_pairs, p_codes,
                    D, KEY_PLANES, SLOTS, False, p_cache.dtype.element_ty, NUM_WARPS,
                )  # fmt: skip
            else:
                _store_part(
                    n, p_rows, p_value + i_head * stride_vh, stride_vt,
                    p_words + base + SLOTS * KEY_PLANES // 2, p_ranges + 2 * D,
                    p_value_clip, p_value_mix, p_value_levels, p_value_source, p_value_pairs,
                    p_codes, D, VALUE_PLANES, SLOTS, True, p_cache.dtype.element_ty, NUM_WARPS,
                )  # fmt: skip
