"""Prefill over visual pages on Hopper in Gluon: codes become 16-bit operands in shared memory.

A program is a warpgroup with 64 rows, pairs of query token and head of one KV head; it reads a
share of its request's runs.  A page is taken in groups of 64 tokens (and one of 32): K of a group
is decoded into one tile of shared memory and V into another, where the products of a whole
warpgroup read them, S = Q K' and O += P V.  The tensor cores multiply while the warps decode: V
beside S, and K of the next group beside O.

A code word of a lane holds a bit of 16 plane blocks of 8 channels (format.py).  Of these a warp
decodes four, of all tokens of the group: it turns the word until their bits are bits 11 to 14 of
each half, of which each alone is a bfloat16 power of two.  So a number is decoded by one LOP3 and
one fused multiply-add, two at a time, and rounded once::

    x = round(2**e b * (s 2**-e) + lo)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .fragments import (
    LEAST_SUM,
    LOG2E,
    PAGE_MASK,
    TAG,
    calibration,
    fetch,
    flushed_exp2,
    group_first,
    group_size,
    num_groups,
    pow2,
)
from .gluon_compat import barrier, reinterpret

ROWS = 64
"""Rows of a program."""

_M = gl.constexpr(ROWS)
_D = gl.constexpr(128)
"""Head size."""


@gluon.constexpr_function
def _bits_of(n, unit):
    return [unit << i for i in range(n.bit_length() - 1)]


@gluon.constexpr_function
def _word_layout(count, bits):
    """Words of ``count`` sub-slots, all of them in every warp."""
    per_lane = 4 if bits <= 2 else 8
    tiles = count * bits * 64 // (32 * per_lane)
    return gl.DistributedLinearLayout(
        [[i] for i in _bits_of(per_lane, 1) + _bits_of(tiles, 32 * per_lane)],
        [[per_lane << i] for i in range(5)],
        [[0], [0]], [], [count * bits * 64],
    )  # fmt: skip


@gluon.constexpr_function
def _key_layout(tokens):
    """[tokens, 4 block groups, 4 plane blocks, 4, 2]: a warp has a group of plane blocks."""
    return gl.DistributedLinearLayout(
        [
            [0, 0, 0, 0, 1],
            *[[i, 0, 0, 0, 0] for i in _bits_of(tokens // 8, 8)],
            [0, 0, 1, 0, 0],
            [0, 0, 2, 0, 0],
        ],
        [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]],
        [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0]], [], [tokens, 4, 4, 4, 2],
    )  # fmt: skip


@gluon.constexpr_function
def _value_layout(groups):
    """[4 block groups, 4 plane blocks, 8 channels, token groups, 4, 2], likewise."""
    return gl.DistributedLinearLayout(
        [
            [0, 0, 0, 0, 0, 1],
            *[[0, 0, 0, i, 0, 0] for i in _bits_of(groups, 1)],
            [0, 1, 0, 0, 0, 0],
            [0, 2, 0, 0, 0, 0],
        ],
        [
            [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 2, 0],
            [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0],
        ],
        [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]], [], [4, 4, 8, groups, 4, 2],
    )  # fmt: skip


_KEY_RANGES = gl.constexpr(
    gl.DistributedLinearLayout([[1], [8], [16]], [[2], [4], [0], [0], [0]], [[32], [64]], [], [128])
)
"""K ranges of the channels that a lane decodes."""

_VALUE_RANGES = gl.constexpr(
    gl.DistributedLinearLayout([[8], [16]], [[0], [0], [1], [2], [4]], [[32], [64]], [], [128])
)
"""V ranges likewise."""


@gluon.constexpr_function
def _innermost(layout):
    """Layout of the last dimension alone."""
    for _ in range(layout.rank - 1):
        layout = gl.SliceLayout(0, layout)
    return layout


@gluon.jit
def _turn(words, count):
    """Words rotated to the left."""
    return gl.inline_asm_elementwise(
        "shf.l.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [words + 0 * count, count + 0 * words],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _masked(word, mask):
    """Two bfloat16 numbers a register: word & mask."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $3;", "=r,r,r,r,r", [word + 0 * mask, mask + 0 * word],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _multiply_add(x, y, z):
    """Products of bfloat16 pairs plus z, rounded once."""
    return gl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _unit(i):
    """2**-e of bit 11 + i, where 2**e is what that bit alone encodes in bfloat16."""
    return pow2(gl.where(i == 0, 111, gl.where(i == 1, 95, gl.where(i == 2, 63, -1))))


@gluon.jit
def _bit_tuple(words, BITS: gl.constexpr):
    """Words [..., BITS] as a tuple of the bits."""
    if BITS == 2:
        w0, w1 = words.split()
        out = (w0, w1)
    else:
        gl.static_assert(BITS == 4)
        even, odd = words.reshape(words.shape[:-1] + [2, 2]).split()
        w0, w2 = even.split()
        w1, w3 = odd.split()
        out = (w0, w1, w2, w3)
    return out


@gluon.jit
def _decode_keys(codes, scale, low, FIRST: gl.constexpr, COUNT: gl.constexpr, BITS: gl.constexpr):
    """K of COUNT sub-slots from FIRST on, bfloat16 [16 COUNT, D]."""
    TOKENS: gl.constexpr = 16 * COUNT
    L: gl.constexpr = _key_layout(TOKENS)
    L4: gl.constexpr = gl.SliceLayout(4, L)
    L3: gl.constexpr = gl.SliceLayout(2, L4)
    w = codes.slice(FIRST * BITS * 64, TOKENS * BITS * 4).load(_word_layout(COUNT, BITS))
    if BITS == 1:
        w = w.reshape([COUNT // 2, 8, 4, 2, 2]).permute((0, 3, 4, 1, 2)).reshape([TOKENS, 4])
        words = (w,)
    else:
        w = w.reshape([COUNT, 8, 4, 2, BITS]).permute((0, 3, 1, 2, 4)).reshape([TOKENS, 4, BITS])
        words = _bit_tuple(w, BITS)
    group = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, L3))).expand_dims(0).expand_dims(2)
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L4))))
    i = i.expand_dims(0).expand_dims(1).expand_dims(3).expand_dims(4)
    half = gl.arange(0, 2, _innermost(L)).expand_dims(0).expand_dims(0).expand_dims(0)
    i += 0 * half.expand_dims(0)
    scale = scale.to(gl.float32).reshape([4, 4, 4, 2])
    scale = gl.convert_layout(scale, gl.SliceLayout(0, L), assert_trivial=True).expand_dims(0)
    scale = (scale * _unit(i)).to(gl.bfloat16)
    low = low.to(gl.bfloat16).reshape([4, 4, 4, 2])
    x = gl.convert_layout(low, gl.SliceLayout(0, L), assert_trivial=True).expand_dims(0)
    for b in gl.static_range(BITS):
        w = gl.convert_layout(words[b], gl.SliceLayout(1, L3), assert_trivial=True)
        w = _turn(w.expand_dims(1), (11 - 4 * group) & 31)
        w = w.expand_dims(2).expand_dims(4)
        x = _multiply_add(_masked(w, 0x08000800 << i), scale, x)
        scale = scale + scale
    return x.reshape([TOKENS, _D])


@gluon.jit
def _decode_values(codes, scale, low, FIRST: gl.constexpr, COUNT: gl.constexpr, BITS: gl.constexpr):
    """V of COUNT sub-slots from FIRST on, bfloat16 [D, 16 COUNT]."""
    GROUPS: gl.constexpr = 2 * COUNT
    L: gl.constexpr = _value_layout(GROUPS)
    L5: gl.constexpr = gl.SliceLayout(5, L)
    L4: gl.constexpr = gl.SliceLayout(1, L5)
    w = codes.slice(FIRST * BITS * 64, GROUPS * BITS * 32).load(_word_layout(COUNT, BITS))
    if BITS == 1:
        w = w.reshape([COUNT // 2, 8, 4, 2, 2]).permute((1, 0, 3, 4, 2)).reshape([8, GROUPS, 4])
        words = (w,)
    else:
        w = w.reshape([COUNT, 8, 4, 2, BITS]).permute((1, 0, 3, 2, 4)).reshape([8, GROUPS, 4, BITS])
        words = _bit_tuple(w, BITS)
    group = gl.arange(0, 4, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L4))))
    group = group.expand_dims(1).expand_dims(2).expand_dims(3)
    LS: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, L5))  # block group, plane block, channel
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, LS))).expand_dims(0).expand_dims(2)
    scale = gl.convert_layout(scale.to(gl.float32).reshape([4, 4, 8]), LS, assert_trivial=True)
    scale = (scale * _unit(i)).to(gl.bfloat16)
    low = gl.convert_layout(low.to(gl.bfloat16).reshape([4, 4, 8]), LS, assert_trivial=True)
    scale = scale.expand_dims(3).expand_dims(4).expand_dims(5)
    half = gl.arange(0, 2, _innermost(L)).expand_dims(0).expand_dims(0)
    half = half.expand_dims(0).expand_dims(0).expand_dims(0)
    i = i.expand_dims(3).expand_dims(4).expand_dims(5) + 0 * half
    x = low.expand_dims(3).expand_dims(4).expand_dims(5)
    for b in gl.static_range(BITS):
        w = gl.convert_layout(words[b], gl.SliceLayout(0, L4), assert_trivial=True)
        w = _turn(w.expand_dims(0), (11 - 4 * group) & 31)
        w = w.expand_dims(1).expand_dims(5)
        x = _multiply_add(_masked(w, 0x08000800 << i), scale, x)
        scale = scale + scale
    return x.reshape([_D, GROUPS * 8])


@gluon.jit
def _key_tile(tile, COUNT: gl.constexpr):
    """K tile of COUNT sub-slots, [16 COUNT, D]."""
    L: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return reinterpret(tile, gl.bfloat16, [16 * COUNT, _D], L)


@gluon.jit
def _value_tile(tile, COUNT: gl.constexpr):
    """V tile of COUNT sub-slots, [D, 16 COUNT]."""
    L: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=32 * COUNT, element_bitwidth=16, rank=2
    )
    return reinterpret(tile, gl.bfloat16, [_D, 16 * COUNT], L)


@gluon.jit
def _attend_group(
    q, keys, values, key_codes, value_codes, k_scale, k_low, v_scale, v_low,
    acc, m_i, l_i, low, high, unit, factor, shift, first_slot, end_slot,
    FIRST: gl.constexpr, COUNT: gl.constexpr, BITS: gl.constexpr, MODE: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Attend to COUNT sub-slots of a page from FIRST on.

    Returns what it was given of the output (still being multiplied), maximum and sum of the
    softmax, and extremes.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16 * COUNT, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    SCORE_ROW: gl.constexpr = gl.SliceLayout(1, S)
    # All warps have waited for the scores before these ones when they met before the output's.
    k_tile = _key_tile(keys, COUNT)
    k_tile.store(_decode_keys(key_codes, k_scale, k_low, FIRST, COUNT, BITS))
    fence_async_shared()
    out = acc
    if FIRST > 0 and MODE != 1:
        out = warpgroup_mma_wait(0, (acc,))
    barrier()  # K is there, and all are done with the V tile
    a = gl.convert_layout(q, gl.DotOperandLayout(0, S, 2), assert_trivial=True)
    s = warpgroup_mma(
        a, k_tile.permute((1, 0)), gl.zeros([_M, 16 * COUNT], gl.float32, S), use_acc=False,
        is_async=True,
    )  # fmt: skip
    v_tile = _value_tile(values, COUNT)
    if MODE != 1:
        v_tile.store(_decode_values(value_codes, v_scale, v_low, FIRST, COUNT, BITS))
        fence_async_shared()
    s, a = warpgroup_mma_wait(0, (s, a))
    # For whole pages too: a branch between the products is more than some releases of ptxas bear.
    o_s = FIRST + gl.arange(0, 16 * COUNT, gl.SliceLayout(0, S)) // 16
    used = ((o_s >= first_slot) & (o_s < end_slot))[None, :]
    s_low = gl.where(used, s, float("inf"))
    s = gl.where(used, s, float("-inf"))
    if MODE == 1:
        high = gl.maximum(high, gl.convert_layout(gl.max(s, 1), ROW, assert_trivial=True))
        low = gl.minimum(low, gl.convert_layout(gl.min(s_low, 1), ROW, assert_trivial=True))
        barrier()  # all are done with the K tile
    else:
        if MODE == 0:
            top = gl.convert_layout(gl.max(s, 1), ROW, assert_trivial=True) * unit
            m_new = gl.maximum(m_i, top)
            alpha = flushed_exp2(m_i - m_new)
            m_i = m_new
            shift = -m_new
            l_i = l_i * alpha
            out = out * alpha[:, None]
        slope = gl.convert_layout(factor, SCORE_ROW, assert_trivial=True)[:, None]
        p = s * slope + gl.convert_layout(shift, SCORE_ROW, assert_trivial=True)[:, None]
        p = flushed_exp2(p)
        l_i += gl.convert_layout(gl.sum(p, 1), ROW, assert_trivial=True)
        p = gl.convert_layout(
            p.to(gl.bfloat16), gl.DotOperandLayout(0, MMA, 2), assert_trivial=True
        )
        barrier()  # V is there, and all are done with the K tile
        acc = warpgroup_mma(p, v_tile.permute((1, 0)), out, is_async=True)
    return acc, m_i, l_i, low, high


# One compilation for all steps: what changes from step to step is not specialised.
@gluon.jit(do_not_specialize=["first_req", "stride_ls", "stride_lh", "splits", "group"])
def _hopper_kernel(
    p_q, stride_qt, stride_qh, p_words, p_cache, stride_page, stride_head,
    p_runs, stride_runs, p_num_runs, p_query_start, first_req,
    p_out, stride_os, stride_ot, stride_oh, p_lse, stride_ls, stride_lh, p_low, p_high,
    scale, tau_min, tau_max, splits, group,
    BITS: gl.constexpr, SLOTS: gl.constexpr, RANGE_OFFSET: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)

    i_head = gl.program_id(1)
    req = first_req + gl.program_id(2) // splits
    i_split = (gl.program_id(2) % splits).to(gl.int64)
    begin = gl.load(p_query_start + req)
    num_rows = (gl.load(p_query_start + req + 1) - begin) * group
    first_row = gl.program_id(0) * _M
    if first_row >= num_rows:
        return
    num_runs = gl.load(p_num_runs + req)
    run_begin = (num_runs * i_split // splits).to(gl.int32)
    run_end = (num_runs * (i_split + 1) // splits).to(gl.int32)
    p_run = p_runs + req.to(gl.int64) * stride_runs

    o_k = gl.arange(0, _D, gl.SliceLayout(0, A))
    o_m = first_row + gl.arange(0, _M, gl.SliceLayout(1, A))
    p_qi = p_q + (begin + o_m // group).to(gl.int64) * stride_qt
    p_qi += (i_head * group + o_m % group) * stride_qh
    m_m = (o_m < num_rows)[:, None]
    q = gl.load(p_qi[:, None] + o_k[None, :], mask=m_m, other=0.0).to(gl.bfloat16)

    o_r = first_row + gl.arange(0, _M, ROW)
    m_r = o_r < num_rows
    o_token = (begin + o_r // group).to(gl.int64)
    o_h = i_head * group + o_r % group
    at_lse = o_h * stride_lh + o_token
    unit = scale * LOG2E
    factor = gl.zeros([_M], gl.float32, ROW) + unit
    shift = gl.zeros([_M], gl.float32, ROW)
    low = gl.full([_M], float("inf"), gl.float32, ROW)
    high = gl.full([_M], float("-inf"), gl.float32, ROW)
    if MODE == 2:
        for i_other in range(splits):
            at = i_other * stride_ls + at_lse
            low = gl.minimum(low, gl.load(p_low + at, mask=m_r, other=0.0))
            high = gl.maximum(high, gl.load(p_high + at, mask=m_r, other=0.0))
        slope, calibrated = calibration(low, high, tau_min, tau_max)
        factor = factor * slope
        shift = -high * slope * LOG2E
    m_i = gl.full([_M], -1e30, gl.float32, ROW)
    l_i = gl.zeros([_M], gl.float32, ROW)
    out = gl.zeros([_M, _D], gl.float32, MMA)

    CODES: gl.constexpr = SLOTS * (BITS * _D // 2)  # words of the K codes
    RANGES: gl.constexpr = RANGE_OFFSET // 2
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = gl.allocate_shared_memory(gl.int32, [4, 8 * _D], flat)
    numbers = reinterpret(ring, p_cache.dtype.element_ty, [4, 16 * _D], flat)
    tiles: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = gl.allocate_shared_memory(gl.bfloat16, [64, _D], tiles)
    values = gl.allocate_shared_memory(gl.bfloat16, [_D, 64], tiles)

    earliest = gl.maximum(gl.minimum(run_begin, run_end - 1), 0)  # a share may be empty
    first = gl.load(p_run + earliest * 2)
    last_slot = gl.load(p_run + earliest * 2 + 1)
    base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
    stage = 0
    if run_begin < run_end:
        fetch(ring.index(0), p_words + base // 2, 0, _D, CODES, RANGES, 4)
        if MODE != 1:
            fetch(ring.index(1), p_words + base // 2, 1, _D, CODES, RANGES, 4)
    async_copy.commit_group()
    for i_run in range(run_begin, run_end):
        end_slot = last_slot + 1
        first_slot = (first >> TAG) - 1
        async_copy.wait_group(0)
        barrier()  # this page is there, and all are done with the one before
        if i_run + 1 < run_end:
            first = gl.load(p_run + i_run * 2 + 2)
            last_slot = gl.load(p_run + i_run * 2 + 3)
            base = (first & PAGE_MASK).to(gl.int64) * stride_page + i_head * stride_head
            fetch(ring.index(2 - stage), p_words + base // 2, 0, _D, CODES, RANGES, 4)
            if MODE != 1:
                fetch(ring.index(3 - stage), p_words + base // 2, 1, _D, CODES, RANGES, 4)
        async_copy.commit_group()
        ranges = numbers.index(stage)
        k_scale = ranges.slice(2 * CODES, _D).load(_KEY_RANGES)
        k_low = ranges.slice(2 * CODES + _D, _D).load(_KEY_RANGES)
        if MODE != 1:
            ranges = numbers.index(stage + 1)
        v_scale = ranges.slice(2 * CODES, _D).load(_VALUE_RANGES)
        v_low = ranges.slice(2 * CODES + _D, _D).load(_VALUE_RANGES)
        acc = out
        for g in gl.static_range(num_groups(SLOTS, SLOTS, 0)):
            acc, m_i, l_i, low, high = _attend_group(
                q, keys, values, ring.index(stage), ring.index(stage + 1), k_scale, k_low, v_scale,
                v_low, acc, m_i, l_i, low, high, unit, factor, shift, first_slot, end_slot,
                group_first(SLOTS, SLOTS, 0, g), group_size(SLOTS, SLOTS, 0, g), BITS, MODE, MMA,
            )  # fmt: skip
        if MODE != 1:
            out = warpgroup_mma_wait(0, (acc,))
        stage = 2 - stage

    at_lse = i_split * stride_ls + at_lse
    if MODE == 1:
        gl.store(p_low + at_lse, low * scale, mask=m_r)
        gl.store(p_high + at_lse, high * scale, mask=m_r)
    else:
        some = l_i > LEAST_SUM
        safe = gl.where(some, l_i, 1.0)
        if MODE == 2:
            lse = calibrated + gl.log(safe)
        else:
            lse = m_i / LOG2E + gl.log(safe)
        gl.store(p_lse + at_lse, gl.where(some, lse, float("-inf")), mask=m_r)
        out = (out * (1.0 / safe)[:, None]).to(p_out.dtype.element_ty)
        p_row = p_out + i_split * stride_os + o_token * stride_ot + o_h * stride_oh
        o_d = gl.arange(0, _D, COLUMN)
        gl.store(p_row[:, None] + o_d[None, :], out, mask=m_r[:, None])
