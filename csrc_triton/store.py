"""Write a step's K and V into the cache: one launch a layer.

Two kinds of program share the launch.  A *text* program copies ``BR`` rows of one KV head to their
slots and scrubs: when the first slot of a text block is written, the rest of the block is zeroed
except the slots that this step writes itself, because the page may hold old codes that read as NaN.
A *visual* program packs K or V of one (visual page, KV head): ranges per channel over the tokens
that the step writes to that page, rounded to the model's dtype as they are stored; then codes
against the rounded ranges, a byte each in scratch memory; then 32-bit words, bit by bit, in the
order of :mod:`vllm_calibquant.format`.

This file serves every format; :mod:`csrc_triton.store_gluon` does the same faster for the common
ones.  Both are compiled without fusing multiplications and additions, so that ranges and codes are
those of PyTorch bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_calibquant.format import PageFormat, tile_slots
from vllm_calibquant.tags import TAG_SHIFT

from .launch import launch
from .metadata import PAGE_MASK, StepTables
from .tables import (
    BLOCK,
    DeviceFormat,
    cache_words,
    cdiv,
    compute_capability,
    next_power_of_2,
)

try:
    from .store_gluon import _store_kernel as _fast_store_kernel
    from .store_profile_gluon import _store_kernel as _profile_store_kernel

    GLUON = True
except ImportError:  # a Triton without Gluon
    GLUON = False

STORE_REGISTERS = 80
"""Registers a thread of the Gluon kernel at 1 bit: three programs of 8 warps a multiprocessor."""

PROFILE_REGISTERS = 128
"""Of the kernel for components of any width: two programs of 8 warps."""

TEXT_PROGRAMS = 1024
"""Of the Gluon kernels, as long as rows of text do not make more; most of a large step find none.

Heads that share a program are copied one after the other.
"""


@triton.jit
def _store_text(
    i_tile,
    i_head,
    p_key,
    p_value,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    p_cache,
    stride_page,
    stride_head,
    p_slot_mapping,
    num_tokens,
    D: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    o_r = i_tile * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    slot = tl.load(p_slot_mapping + o_r, mask=o_r < num_tokens, other=-1).to(tl.int32)
    m_r = (slot >= 0) & ((slot >> 4) <= PAGE_MASK)
    m = m_r[:, None] & m_d[None, :]
    k = tl.load(
        p_key + o_r.to(tl.int64)[:, None] * stride_kt + i_head * stride_kh + o_d[None, :], mask=m
    )
    v = tl.load(
        p_value + o_r.to(tl.int64)[:, None] * stride_vt + i_head * stride_vh + o_d[None, :], mask=m
    )
    p_block = p_cache + (slot >> 4).to(tl.int64) * stride_page + i_head * stride_head
    p_row = p_block + (slot & 15) * (2 * D)
    tl.store(p_row[:, None] + o_d[None, :], k, mask=m)
    tl.store(p_row[:, None] + D + o_d[None, :], v, mask=m)
    first = m_r & ((slot & 15) == 0)
    if tl.max(first.to(tl.int32), 0) > 0:
        zero = tl.zeros([BR, BD], p_cache.dtype.element_ty)
        for j in range(1, 16):
            ahead = o_r + j
            other = tl.load(p_slot_mapping + ahead, mask=first & (ahead < num_tokens), other=-1).to(
                tl.int32
            )
            m_z = (first & (other != slot + j))[:, None] & m_d[None, :]
            tl.store(p_row[:, None] + j * (2 * D) + o_d[None, :], zero, mask=m_z)
            tl.store(p_row[:, None] + j * (2 * D) + D + o_d[None, :], zero, mask=m_z)


@triton.jit
def _order_statistics(keys, k):
    """The k-th and (k+1)-th smallest (from 0) of each column of keys, by bisection over 16 bits."""
    low = tl.full([keys.shape[1]], -32768, tl.int32)
    high = tl.full([keys.shape[1]], 32767, tl.int32)
    for _ in range(16):
        middle = (low + high) >> 1
        enough = tl.sum((keys <= middle[None, :]).to(tl.int32), 0) > k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    at_most = tl.sum((keys <= low[None, :]).to(tl.int32), 0)
    beyond = tl.min(tl.where(keys > low[None, :], keys, 65536), 0)
    return low, tl.where(at_most > k + 1, low, beyond)


@triton.jit
def _to_float(key, dtype: tl.constexpr):
    return (key ^ ((key >> 15) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _quantiles(x, m_t, n, alpha):
    """``alpha`` and ``1 - alpha`` quantiles of each column of 16-bit x ``[BT, BC]``, n valid rows.

    16-bit floats are compared as integers: flipping the low 15 bits of negative ones orders them.
    """
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    keys = tl.where(m_t[:, None], bits ^ ((bits >> 15) & 0x7FFF), 65536)
    where = alpha * (n - 1).to(tl.float32)
    below = where.to(tl.int32)
    share = where - below.to(tl.float32)
    a, b = _order_statistics(keys, below)
    a = _to_float(a, x.dtype)
    b = tl.where(share > 0, _to_float(b, x.dtype), a)
    low = a + (b - a) * share
    first = tl.where(share > 0, n - 2 - below, n - 1 - below)
    a, b = _order_statistics(keys, first)
    a = _to_float(a, x.dtype)
    b = tl.where(share > 0, _to_float(b, x.dtype), a)
    return low, b - (b - a) * share


@triton.jit
def _store_visual(
    i_page,
    i_head,
    p_x,
    stride_xt,
    stride_xh,
    p_words,
    p_ranges,
    p_codes,
    p_source,
    p_clip,
    p_mix,
    p_levels,
    alpha,
    p_page_tokens,
    p_page_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    QUANTILE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BW: tl.constexpr,
):
    n = tl.load(p_page_tokens + i_page)
    p_rows = p_page_rows + i_page * (SLOTS * 16)
    p_x += i_head * stride_xh
    o_t = tl.arange(0, BT)
    if QUANTILE:
        row = tl.load(p_rows + o_t, mask=o_t < n, other=0).to(tl.int64)
        for start in range(0, BD, BC):
            o_c = start + tl.arange(0, BC)
            m_c = o_c < D
            m = (o_t < n)[:, None] & m_c[None, :]
            x = tl.load(p_x + row[:, None] * stride_xt + o_c[None, :], mask=m, other=0)
            low, high = _quantiles(x, o_t < n, n, alpha)
            mean = tl.sum(x.to(tl.float32), 0) / n.to(tl.float32)
            _store_ranges(p_ranges, p_clip, p_mix, p_levels, o_c, m_c, low, high, mean, D)
    else:
        o_c = tl.arange(0, BD)
        m_c = o_c < D
        low = tl.full([BD], float("inf"), tl.float32)
        high = tl.full([BD], float("-inf"), tl.float32)
        mean = tl.zeros([BD], tl.float32)
        for start in range(0, n, BT):
            m_t = start + o_t < n
            row = tl.load(p_rows + start + o_t, mask=m_t, other=0).to(tl.int64)
            m = m_t[:, None] & m_c[None, :]
            x = tl.load(p_x + row[:, None] * stride_xt + o_c[None, :], mask=m, other=0).to(
                tl.float32
            )
            low = tl.minimum(low, tl.min(tl.where(m_t[:, None], x, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(m_t[:, None], x, float("-inf")), 0))
            mean += tl.sum(x, 0)
        mean /= n.to(tl.float32)
        _store_ranges(p_ranges, p_clip, p_mix, p_levels, o_c, m_c, low, high, mean, D)
    tl.debug_barrier()

    o_d = tl.arange(0, BD)
    m_d = o_d < D
    scale = tl.load(p_ranges + o_d, mask=m_d, other=0).to(tl.float32)
    offset = tl.load(p_ranges + D + o_d, mask=m_d, other=0).to(tl.float32)
    levels = tl.load(p_levels + o_d, mask=m_d, other=0)
    o_n = tl.arange(0, BN)
    for first in range(0, n, BN):
        m_n = first + o_n < n
        source = tl.load(p_rows + first + o_n, mask=m_n, other=0).to(tl.int64)
        m_x = m_n[:, None] & m_d[None, :]
        p_source_rows = p_x + source[:, None] * stride_xt + o_d[None, :]
        numbers = tl.load(p_source_rows, mask=m_x, other=0).to(tl.float32)
        codes = _code(numbers, scale[None, :], offset[None, :], levels[None, :]).to(tl.uint8)
        tl.store(p_codes + (first + o_n)[:, None] * D + o_d[None, :], codes, mask=m_x)
    tl.debug_barrier()

    for i in tl.static_range(5, 12):
        if (PLANES >> i) & 1:
            _pack_section(p_codes, p_source, p_words, n, D, PLANES, 1 << i, SLOTS, TRANSPOSED, BW)


@triton.jit
def _pack_section(
    p_codes, p_source, p_words, n,
    D: tl.constexpr, PLANES: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Words of a section of SIZE planes, from codes of a byte each."""
    first_plane: tl.constexpr = PLANES & -(2 * SIZE)  # the larger sections come before
    p_words += first_plane * SLOTS // 2
    FULL: tl.constexpr = 1 if SIZE >= 256 else 2 if SIZE == 128 else 4
    WORDS: tl.constexpr = SLOTS * SIZE // 2
    for start in range(0, WORDS, BW):
        o_w = start + tl.arange(0, BW)
        first = o_w // (FULL * SIZE // 2) * FULL
        count = tl.minimum(FULL, SLOTS - first)
        if FULL == 4 and SLOTS % 4 == 3:  # three sub-slots are a tile of two and one of one
            last = (count == 3) & (o_w - first * (SIZE // 2) >= SIZE)
            count = tl.where(count == 3, tl.where(last, 1, 2), count)
            first += tl.where(last, 2, 0)
        lane_words = tl.maximum(count * SIZE // 64, 1)
        inside = o_w - first * (SIZE // 2)
        lane = inside // lane_words
        word = inside - lane * lane_words
        out = tl.zeros([BW], tl.int32)
        for i in range(32):
            half = i // 16
            pair = word * 16 + i % 16
            group = first * 2 + pair // (SIZE // 8)
            if TRANSPOSED:
                token = group * 8 + 2 * (lane % 4) + half
                plane = first_plane + (pair % (SIZE // 8)) * 8 + lane // 4
            else:
                token = group * 8 + lane // 4
                plane = first_plane + (pair % (SIZE // 8)) * 8 + 2 * (lane % 4) + half
            m = (o_w < WORDS) & (token < n)
            component = tl.load(p_source + plane, mask=m, other=0)
            bit = tl.load(p_source + PLANES + plane, mask=m, other=-1)
            m = m & (bit >= 0)
            code = tl.load(p_codes + token * D + component, mask=m, other=0).to(tl.int32)
            out |= ((code >> bit) & m.to(tl.int32)) << i
        tl.store(p_words + o_w, out, mask=o_w < WORDS)


@triton.jit
def _code(x, scale, offset, levels):
    """Nearest level, halves to the even one; 0 where the channel is constant."""
    steps = tl.where(scale > 0, tl.div_rn(x - offset, tl.where(scale > 0, scale, 1.0)), 0.0)
    steps = tl.minimum(tl.maximum(steps, 0.0), levels)
    whole = tl.floor(steps)
    part = steps - whole
    code = whole.to(tl.int32)
    return code + ((part > 0.5) | ((part == 0.5) & (code % 2 == 1))).to(tl.int32)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """Round to nearest even; by hand for bfloat16, where the interpreter truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _store_ranges(p_ranges, p_clip, p_mix, p_levels, o_c, m_c, low, high, mean, D: tl.constexpr):
    """Scale and offset from the extremes of each channel; its mean if it has no codes."""
    clip = tl.load(p_clip + o_c, mask=m_c, other=0)
    mix = tl.load(p_mix + o_c, mask=m_c, other=0)
    levels = tl.load(p_levels + o_c, mask=m_c, other=0)
    bottom = low * clip + high * mix
    top = low * mix + high * clip
    coded = levels > 0
    scale = tl.where(coded, tl.div_rn(top - bottom, tl.where(coded, levels, 1.0)), 0.0)
    tl.store(p_ranges + o_c, _round(scale, p_ranges.dtype.element_ty), mask=m_c)
    offset = _round(tl.where(coded, bottom, mean), p_ranges.dtype.element_ty)
    tl.store(p_ranges + D + o_c, offset, mask=m_c)


@triton.jit(do_not_specialize=["num_tokens", "num_visual"])
def _store_kernel(
    p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh,
    p_cache, p_words, stride_page, stride_head, p_slot_mapping, num_tokens, num_visual,
    p_plan, p_page_ids, p_page_tokens, p_page_rows,
    p_key_source, p_value_source, p_key_clip, p_value_clip, p_key_mix, p_value_mix,
    p_key_levels, p_value_levels, alpha, p_scratch,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    KEY_PLANES: tl.constexpr, VALUE_PLANES: tl.constexpr, SLOTS: tl.constexpr,
    RANGE_OFFSET: tl.constexpr,
    QUANTILE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_head = tl.program_id(1)
    if i >= 2 * num_visual:
        _store_text(
            i - 2 * num_visual, i_head, p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh,
            p_cache, stride_page, stride_head, p_slot_mapping, num_tokens, D, BD, BR,
        )  # fmt: skip
    else:
        p_codes = p_scratch + (i * tl.num_programs(1) + i_head).to(tl.int64) * (SLOTS * 16 * D)
        for i_page in range(i // 2, tl.load(p_plan + 2), num_visual):
            page = tl.load(p_page_ids + i_page).to(tl.int64)
            # stride_page and stride_head count 16-bit numbers; a word has two.
            base = page * stride_page + i_head * stride_head
            if i % 2 == 0:
                _store_visual(
                    i_page, i_head, p_key, stride_kt, stride_kh,
                    p_words + base // 2, p_cache + base + RANGE_OFFSET, p_codes,
                    p_key_source, p_key_clip, p_key_mix, p_key_levels, alpha,
                    p_page_tokens, p_page_rows,
                    D, BD, KEY_PLANES, SLOTS, False, QUANTILE, BT, BN, BC, BW,
                )  # fmt: skip
            else:
                _store_visual(
                    i_page, i_head, p_value, stride_vt, stride_vh,
                    p_words + base // 2 + SLOTS * KEY_PLANES // 2,
                    p_cache + base + RANGE_OFFSET + 2 * D, p_codes,
                    p_value_source, p_value_clip, p_value_mix, p_value_levels, alpha,
                    p_page_tokens, p_page_rows,
                    D, BD, VALUE_PLANES, SLOTS, True, QUANTILE, BT, BN, BC, BW,
                )  # fmt: skip


def store(
    tables: StepTables,
    fmt: DeviceFormat,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    quantile: float | None = None,
    kernel: str = "auto",
) -> None:
    """Write the step's K and V into text blocks and visual pages.

    Parameters
    ----------
    tables
        The step's tables (:func:`csrc_triton.build_tables`).
    fmt
        Page format with the weights of ranges.
    key, value
        ``[num_tokens, num_kv_heads, D]`` in the cache's dtype, last dimension contiguous; K after
        RoPE.  With a static basis (method.md, last section) pass the transformed tensors: ranges
        and codes are per component of whatever is given.
    kv_cache
        ``[num_blocks, num_kv_heads, 16, 2 D]``, one contiguous run for each (page, head).
    slot_mapping
        int64 ``[num_tokens]``, as given to :func:`csrc_triton.build_tables`; negative is padding.
    quantile
        None for ranges from the extremes; otherwise the share (0 .. 0.5) of a channel's values
        beyond the range at either end, with linear interpolation as ``torch.quantile`` does.
    kernel
        "gluon", "triton", or "auto": Gluon where it serves the format, the device and the strides.

    Raises
    ------
    ValueError
        For a dtype other than the cache's, a strided last dimension, a split (page, head), or if
        ``kernel="gluon"`` does not serve the call.
    """
    num_tokens, num_heads = key.shape[:2]
    page = fmt.page
    if key.dtype != kv_cache.dtype or value.dtype != kv_cache.dtype or page.dtype != kv_cache.dtype:
        raise ValueError(f"K is {key.dtype}, V {value.dtype}, the cache {kv_cache.dtype}")
    if key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("the last dimension of K and V must be contiguous")
    if num_tokens == 0:
        return
    words = cache_words(kv_cache)
    # A request's visual blocks of a step fill pages in order, so all but its last page are full,
    # and one new token fills no block.
    visual = min(num_tokens // (2 * BLOCK), num_tokens // page.tokens + tables.num_prefills)
    use_gluon = (
        kernel != "triton"
        and quantile is None
        and gluon_stores(fmt, key.device)
        and _aligned(key)
        and _aligned(value)
    )
    if use_gluon:
        _launch_gluon(tables, fmt, key, value, kv_cache, words, slot_mapping, visual)
        return
    if kernel == "gluon":
        raise ValueError("the Gluon kernel does not serve this call")
    sizes = block_constants(fmt, quantile=quantile is not None)
    sizes["BR"] = 8 if num_tokens <= 512 else 32
    text_tiles = cdiv(num_tokens, sizes["BR"])
    # A program finds the codes of its page in rows of tokens before it takes them apart.
    scratch = torch.empty(
        2 * visual * num_heads * page.tokens * page.head_size, dtype=torch.uint8, device=key.device
    )
    launch(
        _store_kernel, (text_tiles + 2 * visual, num_heads),
        key, value, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv_cache, words, kv_cache.stride(0), kv_cache.stride(1), slot_mapping, num_tokens, visual,
        tables.plan, tables.page_ids, tables.page_tokens, tables.page_rows,
        fmt.key_source, fmt.value_source, fmt.key_clips, fmt.value_clips,
        fmt.key_mixes, fmt.value_mixes, fmt.key_levels, fmt.value_levels, quantile or 0.0, scratch,
        KEY_PLANES=page.key_planes, VALUE_PLANES=page.value_planes,
        SLOTS=page.slots, RANGE_OFFSET=page.range_offset // 2,
        **sizes, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


def gluon_stores(fmt: DeviceFormat, device: torch.device) -> bool:
    """Whether a Gluon kernel serves a format and device."""
    return (
        GLUON
        and compute_capability(device) >= (8, 0)
        and fmt.page.head_size in (64, 128)
        and (_stores_uniform(fmt) or (fmt.key_pairs is not None and fmt.value_pairs is not None))
    )


def _stores_uniform(fmt: DeviceFormat) -> bool:
    bits = fmt.uniform_bits
    return bits in (1, 2, 4) and (bits > 1 or fmt.page.slots % 2 == 0)


def _aligned(x: torch.Tensor) -> bool:
    """Whether each row of a head begins at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0


def _launch_gluon(
    tables: StepTables,
    fmt: DeviceFormat,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    words: torch.Tensor,
    slot_mapping: torch.Tensor,
    visual: int,
) -> None:
    num_tokens, num_heads = key.shape[:2]
    text_tiles = cdiv(num_tokens, BLOCK)
    head_step = min(num_heads, max(TEXT_PROGRAMS // text_tiles, 1))
    if not _stores_uniform(fmt):
        _launch_profile(
            tables, fmt, key, value, kv_cache, words, slot_mapping, visual, text_tiles, head_step
        )
        return
    constants = gluon_constants(fmt)
    warps = constants["NUM_WARPS"]
    limit = {"maxnreg": STORE_REGISTERS} if fmt.uniform_bits == 1 else {}
    k, v = key.view(torch.int32), value.view(torch.int32)
    launch(
        _fast_store_kernel, (2 * visual * num_heads + text_tiles * head_step,),
        k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        kv_cache, words, words.stride(0), words.stride(1), slot_mapping, num_tokens, num_heads,
        visual, head_step, tables.plan, tables.page_ids, tables.page_tokens, tables.page_rows,
        fmt.key_clips, fmt.value_clips, fmt.key_mixes, fmt.value_mixes,
        HOPPER=compute_capability(key.device) >= (9, 0), **constants,
        num_warps=warps, enable_fp_fusion=False, **limit,
    )  # fmt: skip


def _launch_profile(
    tables: StepTables,
    fmt: DeviceFormat,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    words: torch.Tensor,
    slot_mapping: torch.Tensor,
    visual: int,
    text_tiles: int,
    head_step: int,
) -> None:
    num_tokens, num_heads = key.shape[:2]
    page = fmt.page
    constants = profile_constants(fmt)
    warps = constants["NUM_WARPS"]
    k, v = key.view(torch.int32), value.view(torch.int32)
    programs = 2 * visual * num_heads
    scratch = torch.empty(
        programs * page.tokens * page.head_size // 2, dtype=torch.int32, device=key.device
    )
    launch(
        _profile_store_kernel, (programs + text_tiles * head_step,),
        k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        kv_cache, words, words.stride(0), words.stride(1), slot_mapping, num_tokens, num_heads,
        visual, head_step, tables.plan, tables.page_ids, tables.page_tokens, tables.page_rows,
        fmt.key_clips, fmt.value_clips, fmt.key_mixes, fmt.value_mixes, fmt.key_levels,
        fmt.value_levels, fmt.key_source, fmt.value_source, fmt.key_pairs, fmt.value_pairs, scratch,
        **constants, num_warps=warps, enable_fp_fusion=False, maxnreg=PROFILE_REGISTERS,
    )  # fmt: skip


def profile_constants(fmt: DeviceFormat) -> dict[str, int]:
    """Constants of the Gluon kernel for components of any width."""
    page = fmt.page
    return {
        "D": page.head_size,
        "KEY_PLANES": page.key_planes,
        "VALUE_PLANES": page.value_planes,
        "SLOTS": page.slots,
        "RANGE_OFFSET": page.range_offset // 2,
        "BR": BLOCK,
        "NUM_WARPS": 8 if page.slots > 8 else 4,
    }


def gluon_constants(fmt: DeviceFormat) -> dict[str, int]:
    """Constants of the Gluon kernel for a format: a warp has 32 tokens of a page."""
    page, bits = fmt.page, fmt.uniform_bits
    return {
        "D": page.head_size,
        "BITS": bits,
        "SLOTS": page.slots,
        "FULL": tile_slots(page.key_planes),
        "RANGE_OFFSET": page.range_offset // 2,
        "BR": BLOCK,
        "NUM_WARPS": 8 // bits,
    }


def block_constants(fmt: DeviceFormat, *, quantile: bool) -> dict[str, int]:
    """Block sizes of the plain kernel for a format."""
    page = fmt.page
    return {
        "D": page.head_size,
        "BD": next_power_of_2(page.head_size),
        "BR": 8,
        "QUANTILE": quantile,
        "BT": next_power_of_2(max(page.tokens, 64)) if quantile else 32,
        "BN": 32,
        "BC": 16,
        "BW": 1024,
    }


def quantise(
    x: torch.Tensor,
    bits: tuple[int, ...],
    clip: torch.Tensor,
    dtype: torch.dtype,
    quantile: float | None = None,
    mix: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and ranges of the tokens of one page and head, in plain PyTorch.

    Parameters
    ----------
    x
        ``[n, D]``.
    bits
        Bits of each component.
    clip, mix
        Weights a and b of a range (:class:`csrc_triton.DeviceFormat`) of each component.
    dtype
        Dtype in which scale and offset are stored; the codes are chosen against the rounded ranges.
    quantile
        As in :func:`store`.

    Returns
    -------
    codes : torch.Tensor
        uint8 ``[n, D]``.
    scale, offset : torch.Tensor
        ``[D]`` in ``dtype``.
    """
    x = x.float()
    levels = torch.tensor([2.0**b - 1 for b in bits])
    if quantile is None:
        low, high = x.amin(0), x.amax(0)
    else:
        low, high = torch.quantile(x, torch.tensor([quantile, 1 - quantile]), dim=0)
    low, high = low * clip + high * mix, low * mix + high * clip
    scale = torch.where(levels > 0, (high - low) / levels.clamp(min=1), 0).to(dtype)
    offset = torch.where(levels > 0, low, x.mean(0)).to(dtype)
    s = scale.float()
    steps = torch.where(s > 0, (x - offset.float()) / torch.where(s > 0, s, 1), 0)
    return steps.clamp(min=0).minimum(levels).round().to(torch.uint8), scale, offset


def naive_store(
    pages: list[tuple[int, list[int]]],
    fmt: DeviceFormat,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    quantile: float | None = None,
) -> None:
    """Twin of :func:`store`; ``pages`` is that of :func:`csrc_triton.metadata.naive_tables`."""
    page_format: PageFormat = fmt.page
    d = page_format.head_size
    written = {s for s in slot_mapping.tolist() if s >= 0}
    for row, slot in enumerate(slot_mapping.tolist()):
        block = slot // BLOCK
        if slot >= 0 and block < 1 << TAG_SHIFT:
            kv_cache[block, :, slot % BLOCK, :d] = key[row]
            kv_cache[block, :, slot % BLOCK, d:] = value[row]
            if slot % BLOCK == 0:
                for j in range(1, BLOCK):
                    if slot + j not in written:
                        kv_cache[block, :, j] = 0
    for page, rows in pages:
        for head in range(key.shape[1]):
            k, ks, ko = quantise(
                key[rows, head], page_format.key_bits, fmt.key_clips, page_format.dtype, quantile,
                fmt.key_mixes,
            )  # fmt: skip
            v, vs, vo = quantise(
                value[rows, head], page_format.value_bits, fmt.value_clips, page_format.dtype,
                quantile, fmt.value_mixes,
            )  # fmt: skip
            packed = page_format.pack(k, v, torch.stack([ks, ko, vs, vo]))
            used = page_format.range_offset
            end = page_format.value_code_offset + page_format.value_code_bytes
            target = kv_cache[page, head].view(torch.uint8).flatten()
            target[:end] = packed[:end]
            target[used:] = packed[used:]
