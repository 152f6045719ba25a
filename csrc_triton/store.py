"""Write a step's K and V into the cache: one launch a layer.

Two kinds of program share the launch.  A *text* program copies ``BR`` rows of one KV head to their
slots and scrubs: when the first slot of a text block is written, the rest of the block is zeroed
except the slots that this step writes itself, because the page may hold old codes that read as NaN.
A *visual* program packs K or V of one (visual page, KV head): ranges per channel over the tokens
that the step writes to that page, rounded to the model's dtype as they are stored; then codes
against the rounded ranges; then 32-bit words in the order of :mod:`vllm_calibquant.format`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_calibquant.format import PageFormat

from .metadata import StepTables
from .tables import BLOCK, TAG_SHIFT, DeviceFormat, cache_words

_PAGE_MASK = tl.constexpr((1 << TAG_SHIFT) - 1)


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
    m_r = (slot >= 0) & ((slot >> 4) <= _PAGE_MASK)
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
    p_source,
    p_clip,
    p_levels,
    alpha,
    p_page_tokens,
    p_page_rows,
    D: tl.constexpr,
    BD: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    FULL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    QUANTILE: tl.constexpr,
    BT: tl.constexpr,
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
            _store_ranges(p_ranges, p_clip, p_levels, o_c, m_c, low, high, mean, D)
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
        _store_ranges(p_ranges, p_clip, p_levels, o_c, m_c, low, high, mean / n.to(tl.float32), D)
    tl.debug_barrier()

    NB: tl.constexpr = PLANES // 8
    TILE_WORDS: tl.constexpr = FULL * PLANES // 2
    WORDS: tl.constexpr = SLOTS * PLANES // 2
    for start in range(0, WORDS, BW):
        o_w = start + tl.arange(0, BW)
        tile = o_w // TILE_WORDS
        lane_words = tl.minimum(FULL, SLOTS - tile * FULL) * PLANES // 64
        inside = o_w - tile * TILE_WORDS
        lane = inside // tl.maximum(lane_words, 1)
        word = inside - lane * lane_words
        out = tl.zeros([BW], tl.int32)
        for i in range(32):
            half = i // 16
            pair = word * 16 + i % 16
            group = tile * (FULL * 2) + pair // NB
            if TRANSPOSED:
                token = group * 8 + 2 * (lane % 4) + half
                plane = (pair % NB) * 8 + lane // 4
            else:
                token = group * 8 + lane // 4
                plane = (pair % NB) * 8 + 2 * (lane % 4) + half
            m = (o_w < WORDS) & (token < n)
            component = tl.load(p_source + plane, mask=m, other=0)
            bit = tl.load(p_source + PLANES + plane, mask=m, other=-1)
            m = m & (bit >= 0)
            source = tl.load(p_rows + token, mask=m, other=0).to(tl.int64)
            x = tl.load(p_x + source * stride_xt + component, mask=m, other=0).to(tl.float32)
            scale = tl.load(p_ranges + component, mask=m, other=0).to(tl.float32)
            offset = tl.load(p_ranges + D + component, mask=m, other=0).to(tl.float32)
            levels = tl.load(p_levels + component, mask=m, other=0)
            out |= ((_code(x, scale, offset, levels) >> bit) & m.to(tl.int32)) << i
        tl.store(p_words + o_w, out, mask=o_w < WORDS)


@triton.jit
def _store_visual_whole(
    i_page, i_head, p_x, stride_xt, stride_xh, p_words, p_ranges, p_clip,
    p_page_tokens, p_page_rows,
    D: tl.constexpr, BITS: tl.constexpr, SLOTS: tl.constexpr, FULL: tl.constexpr,
    TRANSPOSED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same for 128 channels of equal width, without a gather for each bit.

    With 16 plane blocks a plane bit, word (token group, bit) of a lane holds all its channels, so a
    word is a sum of shifted codes over the plane blocks and the two halves.
    """
    n = tl.load(p_page_tokens + i_page)
    o_t = tl.arange(0, BC)
    o_d = tl.arange(0, D)
    lows = tl.full([BC, D], float("inf"), tl.float32)
    highs = tl.full([BC, D], float("-inf"), tl.float32)
    for start in tl.static_range(0, BT, BC):
        m_t = start + o_t < n
        row = tl.load(p_page_rows + i_page * (SLOTS * 16) + start + o_t, mask=m_t, other=0)
        p_row = p_x + i_head * stride_xh + row.to(tl.int64) * stride_xt
        x = tl.load(p_row[:, None] + o_d[None, :], mask=m_t[:, None], other=0).to(tl.float32)
        lows = tl.minimum(lows, tl.where(m_t[:, None], x, float("inf")))
        highs = tl.maximum(highs, tl.where(m_t[:, None], x, float("-inf")))
    clip = tl.load(p_clip + o_d)
    low = tl.min(lows, 0) * clip
    high = tl.max(highs, 0) * clip
    dtype: tl.constexpr = p_ranges.dtype.element_ty
    scale = _round(tl.div_rn(high - low, tl.full([D], (1 << BITS) - 1.0, tl.float32)), dtype)
    offset = _round(low, dtype)
    tl.store(p_ranges + o_d, scale)
    tl.store(p_ranges + D + o_d, offset)
    scale = scale.to(tl.float32)[None, :]
    offset = offset.to(tl.float32)[None, :]

    GROUPS: tl.constexpr = BC // 8
    if TRANSPOSED:
        o_bit = tl.reshape(tl.arange(0, 2), [1, 1, 2, 1, 1]) * 16
        o_bit = o_bit + tl.reshape(tl.arange(0, 16), [1, 1, 1, 16, 1])
        lane = tl.arange(0, 4)[:, None] + 4 * tl.arange(0, 8)[None, :]
    else:
        o_bit = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2]) * 16
        o_bit = o_bit + tl.reshape(tl.arange(0, 16), [1, 1, 16, 1, 1])
        lane = 4 * tl.arange(0, 8)[:, None] + tl.arange(0, 4)[None, :]
    for start in range(0, SLOTS * 16, BC):
        # The rows come from L1 now; a whole page of codes would not fit the registers.
        o_c = start + tl.arange(0, BC)
        m_c = o_c < n
        source = tl.load(p_page_rows + i_page * (SLOTS * 16) + o_c, mask=m_c, other=0)
        p_source = p_x + i_head * stride_xh + source.to(tl.int64) * stride_xt
        again = tl.load(p_source[:, None] + o_d[None, :], mask=m_c[:, None], other=0).to(tl.float32)
        if BITS == 1:
            codes = ((again - offset > 0.5 * scale) & (scale > 0)).to(tl.int32)
        else:
            codes = _code(again, scale, offset, (1 << BITS) - 1.0)
        codes = tl.where(m_c[:, None], codes, 0)
        group = start // 8 + tl.arange(0, GROUPS)
        tile = group // (2 * FULL)
        lane_words = tl.minimum(FULL, SLOTS - tile * FULL) * (2 * BITS)
        at = tile * (FULL * 64 * BITS) + (group - tile * (2 * FULL)) * BITS
        at = at[:, None, None] + lane[None, :, :] * lane_words[:, None, None]
        for b in tl.static_range(BITS):
            bit = (codes >> b) & 1
            if TRANSPOSED:
                words = tl.reshape(bit, [GROUPS, 4, 2, 16, 8]) << o_bit
                words = tl.sum(tl.sum(words, 3), 2)
            else:
                words = tl.reshape(bit, [GROUPS, 8, 16, 4, 2]) << o_bit
                words = tl.sum(tl.sum(words, 4), 2)
            tl.store(p_words + at + b, words, mask=(group < SLOTS * 2)[:, None, None])


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
def _store_ranges(p_ranges, p_clip, p_levels, o_c, m_c, low, high, mean, D: tl.constexpr):
    """Scale and offset from the extremes of each channel; its mean if it has no codes."""
    clip = tl.load(p_clip + o_c, mask=m_c, other=0)
    levels = tl.load(p_levels + o_c, mask=m_c, other=0)
    low *= clip
    high *= clip
    coded = levels > 0
    scale = tl.where(coded, tl.div_rn(high - low, tl.where(coded, levels, 1.0)), 0.0)
    tl.store(p_ranges + o_c, _round(scale, p_ranges.dtype.element_ty), mask=m_c)
    offset = _round(tl.where(coded, low, mean), p_ranges.dtype.element_ty)
    tl.store(p_ranges + D + o_c, offset, mask=m_c)


@triton.jit
def _store_kernel(
    p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh,
    p_cache, p_words, stride_page, stride_head, p_slot_mapping, num_tokens, num_visual,
    p_plan, p_page_ids, p_page_tokens, p_page_rows,
    p_key_source, p_value_source, p_key_clip, p_value_clip, p_key_levels, p_value_levels,
    key_alpha, value_alpha,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    KEY_PLANES: tl.constexpr, VALUE_PLANES: tl.constexpr, SLOTS: tl.constexpr,
    KEY_FULL: tl.constexpr, VALUE_FULL: tl.constexpr, RANGE_OFFSET: tl.constexpr,
    QUANTILE: tl.constexpr, WHOLE_BITS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    i_head = tl.program_id(1)
    if i >= 2 * num_visual:
        _store_text(
            i - 2 * num_visual, i_head, p_key, p_value, stride_kt, stride_kh, stride_vt, stride_vh,
            p_cache, stride_page, stride_head, p_slot_mapping, num_tokens, D, BD, BR,
        )  # fmt: skip
    else:
        for i_page in range(i // 2, tl.load(p_plan + 2), num_visual):
            page = tl.load(p_page_ids + i_page).to(tl.int64)
            # stride_page and stride_head count 16-bit numbers; a word has two.
            base = page * stride_page + i_head * stride_head
            p_value_words = p_words + base // 2 + SLOTS * KEY_PLANES // 2
            if i % 2 == 0:
                if WHOLE_BITS > 0:
                    _store_visual_whole(
                        i_page, i_head, p_key, stride_kt, stride_kh,
                        p_words + base // 2, p_cache + base + RANGE_OFFSET, p_key_clip,
                        p_page_tokens, p_page_rows, D, WHOLE_BITS, SLOTS, KEY_FULL, False, BT, BC,
                    )  # fmt: skip
                else:
                    _store_visual(
                        i_page, i_head, p_key, stride_kt, stride_kh,
                        p_words + base // 2, p_cache + base + RANGE_OFFSET,
                        p_key_source, p_key_clip, p_key_levels, key_alpha,
                        p_page_tokens, p_page_rows,
                        D, BD, KEY_PLANES, SLOTS, KEY_FULL, False, QUANTILE, BT, BC, BW,
                    )  # fmt: skip
            elif WHOLE_BITS > 0:
                _store_visual_whole(
                    i_page, i_head, p_value, stride_vt, stride_vh,
                    p_value_words, p_cache + base + RANGE_OFFSET + 2 * D, p_value_clip,
                    p_page_tokens, p_page_rows, D, WHOLE_BITS, SLOTS, VALUE_FULL, True, BT, BC,
                )  # fmt: skip
            else:
                _store_visual(
                    i_page, i_head, p_value, stride_vt, stride_vh,
                    p_value_words, p_cache + base + RANGE_OFFSET + 2 * D,
                    p_value_source, p_value_clip, p_value_levels, value_alpha,
                    p_page_tokens, p_page_rows,
                    D, BD, VALUE_PLANES, SLOTS, VALUE_FULL, True, QUANTILE, BT, BC, BW,
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
) -> None:
    """Write the step's K and V into text blocks and visual pages.

    Parameters
    ----------
    tables
        The step's tables (:func:`csrc_triton.build_tables`).
    fmt
        Page format with clip factors.
    key, value
        ``[num_tokens, num_kv_heads, D]`` in the cache's dtype, last dimension contiguous; K after
        RoPE.  With a static basis (method.md, last section) pass the transformed tensors: ranges
        and codes are per component of whatever is given, so text tokens then need a launch of
        their own.
    kv_cache
        ``[num_blocks, num_kv_heads, 16, 2 D]``, one contiguous run for each (page, head).
    slot_mapping
        int64 ``[num_tokens]``, as given to :func:`csrc_triton.build_tables`; negative is padding.
    quantile
        None for ranges from the extremes; otherwise the share (0 .. 0.5) of a channel's values
        beyond the range at either end, with linear interpolation as ``torch.quantile`` does.

    Raises
    ------
    ValueError
        For a dtype other than the cache's, a strided last dimension, or a split (page, head).
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
    sizes = block_constants(fmt, quantile=quantile is not None)
    sizes["BR"] = 8 if num_tokens <= 512 else 32
    text_tiles = triton.cdiv(num_tokens, sizes["BR"])
    # A request's visual blocks of a step fill pages in order, so all but its last page are full.
    visual = min(num_tokens // (2 * BLOCK), num_tokens // page.tokens + tables.num_reqs)
    alpha = 0.0 if quantile is None else quantile
    limit = {"maxnreg": 128} if sizes["WHOLE_BITS"] and key.is_cuda else {}
    _store_kernel[(text_tiles + 2 * visual, num_heads)](
        key, value, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv_cache, words, kv_cache.stride(0), kv_cache.stride(1), slot_mapping, num_tokens, visual,
        tables.plan, tables.page_ids, tables.page_tokens, tables.page_rows,
        fmt.key_source, fmt.value_source, fmt.key_clips, fmt.value_clips,
        fmt.key_levels, fmt.value_levels, alpha, alpha,
        KEY_PLANES=page.key_planes, VALUE_PLANES=page.value_planes,
        SLOTS=page.slots, KEY_FULL=page.tile_slots(page.key_planes),
        VALUE_FULL=page.tile_slots(page.value_planes), RANGE_OFFSET=page.range_offset // 2,
        **sizes, num_warps=8, **limit,
    )  # fmt: skip


def block_constants(fmt: DeviceFormat, *, quantile: bool) -> dict[str, int]:
    """Block sizes of the kernel for a format."""
    page = fmt.page
    whole = fmt.uniform_bits if page.head_size == 128 and not quantile else 0
    return {
        "D": page.head_size,
        "BD": triton.next_power_of_2(page.head_size),
        "BR": 8,
        "WHOLE_BITS": whole,
        "QUANTILE": quantile,
        "BT": triton.next_power_of_2(max(page.tokens, 64)) if quantile or whole else 32,
        "BC": 32 if whole else 16,
        "BW": 1024,
    }


def quantise(
    x: torch.Tensor,
    bits: tuple[int, ...],
    clip: torch.Tensor,
    dtype: torch.dtype,
    quantile: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and ranges of the tokens of one page and head, in plain PyTorch.

    Parameters
    ----------
    x
        ``[n, D]``.
    bits, clip
        Bits and clip factor of each component.
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
    low, high = low * clip, high * clip
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
                key[rows, head], page_format.key_bits, fmt.key_clips, page_format.dtype, quantile
            )
            v, vs, vo = quantise(
                value[rows, head],
                page_format.value_bits,
                fmt.value_clips,
                page_format.dtype,
                quantile,
            )
            packed = page_format.pack(k, v, torch.stack([ks, ko, vs, vo]))
            used = page_format.range_offset
            end = page_format.value_code_offset + page_format.value_code_bytes
            target = kv_cache[page, head].view(torch.uint8).flatten()
            target[:end] = packed[:end]
            target[used:] = packed[used:]
