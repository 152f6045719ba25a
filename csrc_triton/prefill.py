"""Prefill attention over cached visual pages: later chunks, prefix hits, next turns.

A short question after a long context makes few programs, so the runs of a request are then shared
among several, whose results a second kernel merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention import ATTEND, CALIBRATE, DOT_DTYPE, EXTREMES, _attend_kernel
from .basis import Turns, merge_turned, spread_query, turn_query
from .decode import MAX_REGISTERS, Part
from .launch import launch
from .merge import add_parts, begin_merge, end_merge, load_planes, merged_heads
from .metadata import StepTables
from .tables import (
    DeviceFormat,
    cache_words,
    cdiv,
    compute_capability,
    next_power_of_2,
    pipeline_stages,
    serves_planes,
    serves_uniform,
)

try:
    from .prefill_gluon import ROWS, _prefill_kernel
    from .prefill_hopper import ROWS as HOPPER_ROWS
    from .prefill_hopper import _hopper_kernel
    from .profile_gluon import ROWS as PLANE_ROWS
    from .profile_gluon import _attend_kernel as _planes_kernel

    GLUON = True
except ImportError:  # a Triton without Gluon
    GLUON = False

MAX_SPLITS = 16
PROGRAMS_PER_SM = {"hopper": 3, "gluon": 8, "planes": 12, "triton": 2}
"""Programs that a multiprocessor runs at once: shares are made while there are fewer."""

MIN_HOPPER_ROWS = 33
"""Rows from which the kernel for tiles of 64 rows is faster than that for 16."""

HOPPER_REGISTERS = 168
"""Three programs a multiprocessor."""

PART_ROWS = 1024
"""Queries whose partial results are held at a time: one number for each plane and channel.

A launch has as many for each of its requests as for the longest.
"""


@triton.jit(
    do_not_specialize=[
        "first_req", "first_query", "stride_ls", "stride_lh", "stride_pr", "stride_ph", "window",
        "splits", "stride_xl",
    ]
)  # fmt: skip
def _merge_kernel(
    p_part, p_part_lse, stride_os, stride_ls, p_query_start, first_req, first_query,
    p_out, stride_ot, stride_oh, p_lse, stride_lh, stride_pr, stride_ph, window, splits,
    p_text, stride_xt, stride_xh, p_text_lse, stride_xl,
    p_plane, NUM_HEADS: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BS: tl.constexpr, HAS_TEXT: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """A program merges BH heads of a query, BS shares at a time.

    With PLANES, parts have a row for each query of the window, as in csrc_triton.merge.
    """
    req = first_req + tl.program_id(0) // window
    row = tl.load(p_query_start + req) + first_query + tl.program_id(0) % window
    if row >= tl.load(p_query_start + req + 1):
        return
    row = row.to(tl.int64)
    i_part = row
    if PLANES > 0:
        i_part = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    planes = load_planes(p_plane, o_d, D, BITS)
    o_p = tl.arange(0, BP)
    p_text += row * stride_xt
    m_h, l_h, out, wide = begin_merge(
        p_text_lse + o_h * stride_xl + row,
        p_text + o_h[:, None] * stride_xh + o_d[None, :],
        m_d, HAS_TEXT, BP,
    )  # fmt: skip
    for start in range(0, splits, BS):
        o_s = start + tl.arange(0, BS)
        m_s = (o_s < splits)[:, None]
        at = o_s[:, None] * stride_ls + o_h[None, :] * stride_ph + i_part * stride_pr
        lse = tl.load(p_part_lse + at, mask=m_s, other=float("-inf"))
        at = o_s[:, None] * stride_os + ((i_part * NUM_HEADS + o_h) * (PLANES + D))[None, :]
        m = m_s[:, :, None] & (o_p < PLANES + D)[None, None, :]
        x = tl.load(p_part + at[:, :, None] + o_p[None, None, :], mask=m, other=0).to(tl.float32)
        m_h, l_h, out, wide = add_parts(m_h, l_h, out, wide, lse, x)
    out, lse = end_merge(m_h, l_h, out, wide, planes, o_d, PLANES)
    p_row = p_out + row * stride_ot + o_h[:, None] * stride_oh
    tl.store(p_row + o_d[None, :], out.to(p_out.dtype.element_ty), mask=m_d)
    tl.store(p_lse + o_h * stride_lh + row, lse)


def _choose_kernel(kernel: str, fmt: DeviceFormat, device: torch.device, rows: int) -> str:
    """The kernel for tiles of some rows: "hopper", "gluon" or "triton"; see the caller."""
    hopper, gluon = hopper_prefills(fmt, device), gluon_prefills(fmt, device)
    if kernel == "auto":
        if hopper and rows >= MIN_HOPPER_ROWS:
            return "hopper"
        return "gluon" if gluon else "triton"
    if not {"hopper": hopper, "gluon": gluon, "triton": True}[kernel]:
        raise ValueError(f"the kernel {kernel!r} does not serve this format on this device")
    return kernel


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Call(NamedTuple):
    """What launches for any of the requests have in common; see :func:`prefill_attention`."""

    tables: StepTables
    fmt: DeviceFormat
    query: torch.Tensor
    """As codes see them, which a basis has turned."""
    spread: torch.Tensor | None
    """The same over planes of K, if that is done."""
    kv_cache: torch.Tensor
    query_start_loc: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    scale: float
    calibration: tuple[float, float] | None
    text: Part | None
    splits: int | None


def prefill_attention(
    tables: StepTables,
    fmt: DeviceFormat,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    first_request: int,
    num_requests: int,
    max_query_len: int,
    scale: float,
    calibration: tuple[float, float] | None = None,
    text: Part | None = None,
    basis: Turns | None = None,
    first_row: int = 0,
    query_lens: Sequence[int] | None = None,
    splits: int | None = None,
    kernel: str = "auto",
) -> None:
    """Attention of many query tokens over the visual pages of their requests' contexts.

    Every query sees every visual token of its request's context (they all precede it), so there is
    no mask.  Without ``text`` the result is one part of the softmax, for
    :func:`csrc_triton.merge_parts`.

    Parameters
    ----------
    tables
        Tables of the step.
    fmt
        Page format of the layer.
    query
        ``[num_tokens, Hq, D]``: all rows of the step.
    kv_cache
        ``[num_blocks, Hkv, 16, 2 D]``, one contiguous run for each (page, head).
    query_start_loc
        int32 ``[>= first_request + num_requests + 1]``: first row of each request.
    out
        ``[num_tokens, Hq, D]``; rows of the named requests are written, 0 without visual pages.
    lse
        float32 ``[Hq, num_tokens]``, likewise; natural logarithm, -inf without visual pages.
    first_request, num_requests
        Which requests of the step to serve.
    max_query_len
        Upper bound of their query lengths: sets the grid.
    scale
        Factor on scores, usually ``D ** -0.5``.
    calibration
        ``(tau_min, tau_max)`` of the score calibration, for each query token and head, or None.
    text
        Output ``[num_tokens, Hq, D]`` and log-sum-exp (float32 ``[Hq, num_tokens]``, -inf or +inf
        for no keys) of all else that the queries see, to merge into ``out`` and ``lse``.
    basis
        In which keys and values were coded, as ``Turns.of`` the same format: two launches more.
    first_row
        First row of the named requests, to which the last rows belong; looked at with a basis.
    query_lens
        Query lengths of the named requests where the host knows them: the kernel for components of
        any width then serves long and short ones apart.
    splits
        Shares of a request's runs, at most 16; None to choose by the number of programs.
    kernel
        "hopper", "gluon", "triton", or "auto": the first that serves the format and the device,
        and "hopper" for enough rows only.

    Raises
    ------
    ValueError
        If the named kernel does not serve the format or the device.
    """
    if num_requests == 0 or max_query_len == 0:
        return
    call = _Call(
        tables, fmt, query, None, kv_cache, query_start_loc, out, lse, scale, calibration, text,
        splits,
    )  # fmt: skip
    if basis is None:
        _attend(call, first_request, num_requests, max_query_len, query_lens, kernel)
        return
    turned, shift, spread = turn_query(query, basis)
    codes = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    codes_lse = torch.empty_like(shift)
    call = call._replace(query=turned, spread=spread, out=codes, lse=codes_lse, text=None)
    _attend(call, first_request, num_requests, max_query_len, query_lens, kernel)
    rows = slice(first_row, None)
    merge_turned(
        out[rows], (codes[rows], codes_lse[:, rows]), shift[:, rows], basis,
        None if text is None else (text[0][rows], text[1][:, rows]),
        scale=scale, lse=lse[:, rows],
    )  # fmt: skip


def _attend(
    call: _Call, first_request: int, num_requests: int, max_query_len: int,
    query_lens: Sequence[int] | None, kernel: str,
) -> None:  # fmt: skip
    """Attention of queries as codes see them."""
    (tables, fmt, query, spread, kv_cache, query_start_loc, out, lse, scale, calibration, text,
     splits) = call  # fmt: skip
    num_heads, d = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    rows = max_query_len * group
    chosen = _choose_kernel(kernel, fmt, query.device, rows)
    if chosen == "gluon" and not serves_uniform(fmt):
        if spread is None:
            call = call._replace(spread=spread_query(query, fmt))
        lens = query_lens or (max_query_len,) * num_requests
        for first, number, longest in alike(lens, PART_ROWS):
            _attend_planes(call, first_request + first, number, longest)
        return
    if chosen == "triton":
        block = 16 if rows <= 16 else 64
    else:
        block = HOPPER_ROWS if chosen == "hopper" else ROWS
    tiles = cdiv(rows, block)
    if splits is None:
        at_once = PROGRAMS_PER_SM[chosen] * _multiprocessors(query.device)
        splits = min(MAX_SPLITS, max(at_once // (tiles * num_kv_heads * num_requests), 1))
    num_tokens = query.shape[0]
    part, part_lse, low, high = out, lse, lse, lse
    stride_os = stride_ls = 0
    merges = splits > 1 or text is not None
    if merges:
        part = query.new_empty((splits, num_tokens, num_heads, d), dtype=torch.float32)
        part_lse = query.new_empty((splits, num_heads, num_tokens), dtype=torch.float32)
        stride_os, stride_ls = part.stride(0), part_lse.stride(0)
    if calibration is not None:
        low, high = (
            torch.empty_strided(
                part_lse.shape, part_lse.stride(), dtype=torch.float32, device=query.device
            )
            for _ in range(2)
        )
    tau_min, tau_max = calibration or (0.0, 0.0)
    page, words, bd = fmt.page, cache_words(kv_cache), next_power_of_2(d)
    grid = (tiles, num_kv_heads, num_requests * splits)
    of_gluon = (
        query, query.stride(0), query.stride(1), words, kv_cache,
        kv_cache.stride(0), kv_cache.stride(1),
        tables.runs, tables.runs.stride(0), tables.num_runs, query_start_loc, first_request,
        part, stride_os, part.stride(-3), part.stride(-2), part_lse, stride_ls,
        part_lse.stride(-2), low, high, scale, tau_min, tau_max, splits, group,
    )  # fmt: skip
    for mode in (ATTEND,) if calibration is None else (EXTREMES, CALIBRATE):
        if chosen == "hopper":
            launch(
                _hopper_kernel, grid,
                *of_gluon, BITS=fmt.uniform_bits, SLOTS=page.slots,
                RANGE_OFFSET=page.range_offset // 2, MODE=mode, num_warps=4,
                maxnreg=HOPPER_REGISTERS,
            )  # fmt: skip
            continue
        if chosen == "gluon":
            launch(
                _prefill_kernel, grid,
                *of_gluon, D=d, BITS=fmt.uniform_bits, SLOTS=page.slots,
                RANGE_OFFSET=page.range_offset // 2, MODE=mode, num_warps=1,
            )  # fmt: skip
            continue
        launch(
            _attend_kernel, grid,
            query, query.stride(0), query.stride(1), words, kv_cache,
            kv_cache.stride(0), kv_cache.stride(1),
            tables.runs, tables.runs.stride(0), tables.num_runs, query_start_loc, first_request,
            tables.items, tables.plan, tables.item_start,
            part, part.stride(-3), part.stride(-2), part_lse, 1, part_lse.stride(-2),
            low, high, fmt.key_plane, fmt.value_plane, scale, tau_min, tau_max,
            stride_os, stride_ls, splits,
            D=d, BD=bd, GROUP=group, BM=block, BT=32 if bd > 128 else 64,
            KEY_BITS=fmt.key_plane.shape[0], VALUE_BITS=fmt.value_plane.shape[0],
            KEY_PLANES=page.key_planes, VALUE_PLANES=page.value_planes, SLOTS=page.slots,
            RANGE_OFFSET=page.range_offset // 2, HALF=tables.half_slots, MODE=mode, DECODE=False,
            DOT=DOT_DTYPE, WHOLE=fmt.whole_words,
            num_warps=4, num_stages=pipeline_stages(fmt, query.device),
        )  # fmt: skip
    if merges:
        heads = merged_heads(num_heads)
        launch(
            _merge_kernel, (num_requests * max_query_len, num_heads // heads),
            part, part_lse, stride_os, stride_ls, query_start_loc, first_request, 0,
            out, out.stride(0), out.stride(1), lse, lse.stride(0), 1, part_lse.stride(1),
            max_query_len, splits, *_text_arguments(text, out, lse), fmt.value_plane,
            NUM_HEADS=num_heads, BH=heads, D=d, BD=bd, BS=8, HAS_TEXT=text is not None,
            PLANES=0, BITS=0, BP=bd, num_warps=1,
        )  # fmt: skip


def alike(query_lens: Sequence[int], rows: int) -> list[tuple[int, int, int]]:
    """Requests that a launch of some rows serves together, if it has as many for each.

    Parameters
    ----------
    query_lens
        Queries of each request.
    rows
        Most rows of requests that are served together.

    Returns
    -------
    list
        First request, number, and most queries of one, of neighbours of similar length.  A request
        with more queries than rows is alone, and one without any may be left out.
    """
    out: list[tuple[int, int, int]] = []
    for i, length in enumerate(query_lens):
        first, number, longest = out[-1] if out else (i, 0, 0)
        longest = max(longest, length)
        if out and (number + 1) * longest <= rows:
            out[-1] = (first, number + 1, longest)
        elif length > 0:
            out.append((i, 1, length))
    return out


def _attend_planes(call: _Call, first_request: int, num_requests: int, max_query_len: int) -> None:
    """:func:`_attend` for components of any width and requests of similar length.

    Computes PART_ROWS queries at a time.
    """
    (tables, fmt, query, spread, kv_cache, query_start_loc, out, lse, scale, calibration, text,
     splits) = call  # fmt: skip
    num_heads, d = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    group, page, planes = num_heads // num_kv_heads, fmt.page, fmt.page.value_planes
    window = min(max_query_len, PART_ROWS)
    tiles = cdiv(window * group, PLANE_ROWS)
    if splits is None:
        at_once = PROGRAMS_PER_SM["planes"] * _multiprocessors(query.device)
        splits = min(MAX_SPLITS, max(at_once // (tiles * num_kv_heads * num_requests), 1))
    shape = (splits, num_requests * window, num_heads)
    # Not parts of one tensor, which could begin anywhere: a kernel is compiled for alignments.
    part_lse = low = high = torch.empty(shape, dtype=torch.float32, device=query.device)
    if calibration is not None:
        low, high = torch.empty_like(part_lse), torch.empty_like(part_lse)
    part = torch.empty(*shape, planes + d, dtype=torch.float32, device=query.device)
    tau_min, tau_max = calibration or (0.0, 0.0)
    for first_query in range(0, max_query_len, window):
        for mode in (ATTEND,) if calibration is None else (EXTREMES, CALIBRATE):
            launch(
                _planes_kernel, (tiles, num_kv_heads, num_requests * splits),
                query, query.stride(0), query.stride(1), spread, cache_words(kv_cache), kv_cache,
                kv_cache.stride(0), kv_cache.stride(1), tables.runs, tables.runs.stride(0),
                tables.items, tables.item_start, tables.program_item, tables.plan,
                tables.num_runs, query_start_loc, first_request, num_requests, first_query, window,
                splits, part, part_lse, low, high,
                fmt.key_pairs, fmt.value_pairs, scale, tau_min, tau_max,
                NUM_HEADS=num_heads, GROUP=group, D=d, KEY_PLANES=page.key_planes,
                VALUE_PLANES=planes, SLOTS=page.slots, RANGE_OFFSET=page.range_offset // 2,
                HALF=tables.half_slots, MODE=mode, DECODE=False, PDL=False,
                WAITS=False, num_warps=1, maxnreg=MAX_REGISTERS[mode],
            )  # fmt: skip
        launch(
            _merge_kernel, (num_requests * window, num_heads),
            part, part_lse, part.stride(0), part_lse.stride(0), query_start_loc, first_request,
            first_query, out, out.stride(0), out.stride(1), lse, lse.stride(0), num_heads, 1,
            window, splits, *_text_arguments(text, out, lse), fmt.value_plane,
            NUM_HEADS=num_heads, BH=1, D=d, BD=next_power_of_2(d), BS=MAX_SPLITS,
            HAS_TEXT=text is not None, PLANES=planes, BITS=fmt.value_plane.shape[0],
            BP=next_power_of_2(planes + d), num_warps=4,
        )  # fmt: skip


def _text_arguments(
    text: Part | None, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor | int, ...]:
    """Arguments of the merge for the text part; stand-ins if there is none."""
    x, x_lse = text or (out, lse)
    return x, x.stride(0), x.stride(1), x_lse, x_lse.stride(0)


def gluon_prefills(fmt: DeviceFormat, device: torch.device) -> bool:
    """Whether a Gluon kernel serves a format and device."""
    return (
        GLUON
        and compute_capability(device) >= (8, 0)
        and (serves_uniform(fmt) or serves_planes(fmt))
    )


def hopper_prefills(fmt: DeviceFormat, device: torch.device) -> bool:
    """Whether the kernel with products of a warpgroup serves a format and device.

    It makes bfloat16 keys of codes and offsets together.  Where the model has float16, that would
    move weight between visual and text tokens if all keys have a large part in common.
    """
    return (
        GLUON
        and fmt.page.dtype == torch.bfloat16
        and compute_capability(device)[0] == 9
        and fmt.page.head_size == 128
        and serves_uniform(fmt)
    )
