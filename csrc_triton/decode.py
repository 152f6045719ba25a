"""Decode attention over visual pages: split over items, calibration, merge with the text part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .attention import ATTEND, CALIBRATE, DOT_DTYPE, EXTREMES, _attend_kernel
from .basis import Turns, merge_turned, spread_query, turn_query
from .launch import launch
from .merge import _merge_splits_kernel, merged_heads
from .metadata import StepTables
from .tables import (
    DeviceFormat,
    cache_words,
    compute_capability,
    next_power_of_2,
    pipeline_stages,
    serves_planes,
    serves_uniform,
)

try:
    from .decode_gluon import _decode_kernel
    from .profile_gluon import _attend_kernel as _profile_kernel

    GLUON = True
except ImportError:  # a Triton without Gluon: the plain kernels serve everything
    GLUON = False

Part = tuple[torch.Tensor, torch.Tensor]
"""Attention over some of the keys: its output and log-sum-exp."""

MAX_REGISTERS = {ATTEND: 168, EXTREMES: 112, CALIBRATE: 168}
"""Registers a thread of the Gluon kernel by mode: more warps on a multiprocessor against spills."""

MAX_GROUP = 16
"""Most query heads of a KV head."""

SCORE_BYTES = 32 << 20
"""Most bytes of scores that are kept between the passes of calibration: they stay in L2."""


def max_registers(mode: int, group: int) -> int:
    """Limit of registers for a mode and a query group (16 query columns need twice as many)."""
    return MAX_REGISTERS[mode] if group <= 8 else 255


@dataclass
class DecodeScratch:
    """Buffers between the launches of a decode step; one set serves all layers.

    Attributes
    ----------
    out : torch.Tensor
        float32 ``[max_items, Hq, D]``: normalised partial output of an item; wider if it is one
        number for each plane (:mod:`csrc_triton.merge`).
    lse, low, high : torch.Tensor
        float32 ``[max_items, Hq]``: its log-sum-exp, smallest and largest score.
    scores : torch.Tensor
        float32 ``[runs, Hq, page tokens]``: with one query head a KV head, the scores of a step
        with few enough runs, kept from the pass for the extremes; no runs otherwise.  The last is
        room to read past the end.
    """

    out: torch.Tensor
    lse: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    scores: torch.Tensor


def allocate_scratch(
    tables: StepTables, num_heads: int, head_size: int, value_planes: int = 0
) -> DecodeScratch:
    """Allocate the buffers of :func:`decode_attention`.

    Parameters
    ----------
    tables
        Tables of the steps.
    num_heads, head_size
        Query heads of this rank and their size.
    value_planes
        Most planes of V of a format whose components differ in width; 0 if there is none.
    """
    shape = (tables.max_items, num_heads)
    device = tables.plan.device
    page_tokens = tables.page_rows.shape[1]
    score_runs = SCORE_BYTES // (4 * num_heads * page_tokens)
    if num_heads != tables.num_kv_heads:
        score_runs = 0
    return DecodeScratch(
        out=torch.empty(*shape, value_planes + head_size, dtype=torch.float32, device=device),
        lse=torch.empty(shape, dtype=torch.float32, device=device),
        low=torch.empty(shape, dtype=torch.float32, device=device),
        high=torch.empty(shape, dtype=torch.float32, device=device),
        scores=torch.empty(
            score_runs + 1, num_heads, page_tokens, dtype=torch.float32, device=device
        ),
    )


def decode_attention(
    tables: StepTables,
    scratch: DecodeScratch,
    fmt: DeviceFormat,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    calibration: tuple[float, float] | None = None,
    text: Part | None = None,
    lse: torch.Tensor | None = None,
    basis: Turns | None = None,
    kernel: str = "auto",
) -> None:
    """Attention of one new token of each request over its visual pages, merged with the text part.

    Two launches, one more with calibration and two more with a basis; where the device can, each
    begins before the one before it has ended.  The grid depends on shapes only.

    Parameters
    ----------
    tables
        Tables of the step; row i of ``query`` is request i, which must be one of the first
        ``num_decodes`` requests.
    scratch
        Buffers of :func:`allocate_scratch`.
    fmt
        Page format of the layer.
    query
        ``[num_requests, Hq, D]``; head h reads KV head ``h // (Hq // Hkv)``.
    kv_cache
        ``[num_blocks, Hkv, 16, 2 D]``, one contiguous run for each (page, head).
    out
        ``[num_requests, Hq, D]``, written.
    scale
        Factor on scores, usually ``D ** -0.5``.
    calibration
        ``(tau_min, tau_max)`` of the score calibration, or None.
    text
        Output ``[num_requests, Hq, D]`` and log-sum-exp (float32 ``[Hq, num_requests]``, natural
        logarithm, -inf or +inf for no keys) of the text part, or None if there is none.
    lse
        float32 ``[Hq, num_requests]``, written if given: the log-sum-exp of everything in ``out``.
    basis
        In which keys and values were coded, as ``Turns.of`` the same format.
    kernel
        "gluon", "triton", or "auto": Gluon where it serves the format and the device.

    Raises
    ------
    ValueError
        For more than 16 query heads a KV head, or if ``kernel="gluon"`` does not serve the format.
    """
    num_requests, num_heads, d = query.shape
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    if num_heads % num_kv_heads or group > MAX_GROUP:
        raise ValueError(
            f"{num_heads} query heads over {num_kv_heads} KV heads: at most {MAX_GROUP} a KV head"
        )
    if num_requests == 0:
        return
    use_gluon = kernel != "triton" and gluon_serves(fmt, group, query.device)
    if kernel == "gluon" and not use_gluon:
        raise ValueError("the Gluon kernel does not serve this format on this device")
    planes = 0
    split: Callable[..., None]
    if not use_gluon:
        split = _split_triton
    elif serves_uniform(fmt):
        split = _split_gluon
    else:
        split = _split_profile
        planes = fmt.page.value_planes
    if scratch.out.shape[2] < planes + d:
        raise ValueError(
            f"scratch for {scratch.out.shape[2] - d} planes of V, and pages have {planes}"
        )
    pdl = use_gluon and dependent_launch(query.device)
    if basis is None:
        split(tables, scratch, fmt, query, kv_cache, scale, calibration)
        _merge_splits(tables, scratch, fmt, out, text, lse, planes, pdl, False)
        return
    turned, shift, spread = turn_query(query, basis, pdl=pdl)
    codes = torch.empty_like(query, dtype=torch.float32)
    codes_lse = torch.empty_like(shift)
    if planes:
        split = partial(_split_profile, spread=spread)
    elif use_gluon:
        split = partial(_split_gluon, turned=True)
    split(tables, scratch, fmt, turned, kv_cache, scale, calibration)
    _merge_splits(tables, scratch, fmt, codes, None, codes_lse, planes, pdl, True)
    merge_turned(out, (codes, codes_lse), shift, basis, text, scale=scale, lse=lse, pdl=pdl)


def _merge_splits(
    tables: StepTables,
    scratch: DecodeScratch,
    fmt: DeviceFormat,
    out: torch.Tensor,
    text: Part | None,
    lse: torch.Tensor | None,
    planes: int,
    pdl: bool,
    turned: bool,
) -> None:
    """Merge the parts in ``scratch``, and the text part; ``turned``: for :func:`merge_turned`."""
    num_requests, num_heads, d = out.shape
    text_out, text_lse = text or (out, scratch.lse)
    out_lse = scratch.lse if lse is None else lse
    heads, items, warps = _merge_tile(tables, num_requests, num_heads, planes)
    launch(
        _merge_splits_kernel, (num_requests, num_heads // heads),
        scratch.out, scratch.lse, tables.item_start, 0,
        text_out, text_out.stride(0), text_out.stride(1), text_lse, text_lse.stride(0),
        out, out.stride(0), out.stride(1), out_lse, out_lse.stride(0),
        fmt.value_plane, NUM_HEADS=num_heads, BH=heads, D=d, BD=next_power_of_2(d),
        HAS_TEXT=text is not None, HAS_LSE=lse is not None, BI=items, PDL=pdl,
        TURNED=turned, PLANES=planes,
        BITS=fmt.value_plane.shape[0] if planes else 0, BP=next_power_of_2(planes + d),
        num_warps=warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _merge_tile(
    tables: StepTables, num_requests: int, num_heads: int, planes: int
) -> tuple[int, int, int]:
    """Heads of a program of the merge, items that it loads at a time, and its warps."""
    # Few requests have many items each, and what counts is how often one load waits for another.
    if num_requests * 16 <= tables.target_programs:
        return 1, 32, 8 if planes else 2
    if planes:
        return 1, 8, 2
    return merged_heads(num_heads), 8, 1


def gluon_serves(fmt: DeviceFormat, group: int, device: torch.device) -> bool:
    """Whether a Gluon decode kernel serves a format, query group and device."""
    return (
        GLUON
        and compute_capability(device) >= (8, 0)
        and ((serves_uniform(fmt) and group <= MAX_GROUP) or (serves_planes(fmt) and group <= 8))
    )


def dependent_launch(device: torch.device) -> bool:
    """Whether a launch may start before the one it depends on has ended (Hopper and newer)."""
    return compute_capability(device) >= (9, 0)


def _split_gluon(
    tables: StepTables,
    scratch: DecodeScratch,
    fmt: DeviceFormat,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    calibration: tuple[float, float] | None,
    turned: bool = False,
) -> None:
    _, num_heads, d = query.shape
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    tau_min, tau_max = calibration or (0.0, 0.0)
    pdl = dependent_launch(query.device)
    for mode in (ATTEND,) if calibration is None else (EXTREMES, CALIBRATE):
        launch(
            _decode_kernel, (num_kv_heads, tables.target_programs),
            query, query.stride(0), query.stride(1), cache_words(kv_cache), kv_cache,
            kv_cache.stride(0), kv_cache.stride(1),
            tables.runs, tables.runs.stride(0),
            tables.items, tables.item_start, tables.half_start, tables.program_item, tables.plan,
            scratch.out, scratch.lse, scratch.low, scratch.high,
            scratch.scores, scratch.scores.shape[0] - 1, scale, tau_min, tau_max,
            NUM_HEADS=num_heads, GROUP=group, N=8 if group <= 8 else 16, D=d,
            BITS=fmt.uniform_bits, SLOTS=fmt.page.slots, RANGE_OFFSET=fmt.page.range_offset // 2,
            HALF=tables.half_slots, MODE=mode, PDL=pdl, TURNED=pdl and turned,
            num_warps=1, maxnreg=max_registers(mode, group),
            **({"launch_pdl": True} if pdl and (turned or mode == CALIBRATE) else {}),
        )  # fmt: skip


def _split_profile(
    tables: StepTables,
    scratch: DecodeScratch,
    fmt: DeviceFormat,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    calibration: tuple[float, float] | None,
    spread: torch.Tensor | None = None,
) -> None:
    turned = spread is not None  # by a launch that this one need not have waited for
    if spread is None:
        spread = spread_query(query, fmt)
    _, num_heads, d = query.shape
    num_kv_heads = kv_cache.shape[1]
    tau_min, tau_max = calibration or (0.0, 0.0)
    pdl = dependent_launch(query.device)
    page = fmt.page
    for mode in (ATTEND,) if calibration is None else (EXTREMES, CALIBRATE):
        waits = pdl and (turned or mode == CALIBRATE)
        launch(
            _profile_kernel, (num_kv_heads, tables.target_programs),
            query, query.stride(0), query.stride(1), spread, cache_words(kv_cache), kv_cache,
            kv_cache.stride(0), kv_cache.stride(1),
            tables.runs, tables.runs.stride(0),
            tables.items, tables.item_start, tables.program_item, tables.plan,
            tables.num_runs, tables.num_runs, 0, 0, 0, 0, 1,
            scratch.out, scratch.lse, scratch.low, scratch.high,
            fmt.key_pairs, fmt.value_pairs, scale, tau_min, tau_max,
            NUM_HEADS=num_heads, GROUP=num_heads // num_kv_heads, D=d,
            KEY_PLANES=page.key_planes, VALUE_PLANES=page.value_planes, SLOTS=page.slots,
            RANGE_OFFSET=page.range_offset // 2, HALF=tables.half_slots, MODE=mode, DECODE=True,
            PDL=pdl, WAITS=waits, num_warps=1, maxnreg=MAX_REGISTERS[mode],
            **({"launch_pdl": True} if waits else {}),
        )  # fmt: skip


def _split_triton(
    tables: StepTables,
    scratch: DecodeScratch,
    fmt: DeviceFormat,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    scale: float,
    calibration: tuple[float, float] | None,
) -> None:
    num_requests, num_heads, d = query.shape
    page = fmt.page
    tau_min, tau_max = calibration or (0.0, 0.0)
    bd = next_power_of_2(d)
    for mode in (ATTEND,) if calibration is None else (EXTREMES, CALIBRATE):
        launch(
            _attend_kernel, (tables.items_for(num_requests), kv_cache.shape[1]),
            query, query.stride(0), query.stride(1), cache_words(kv_cache), kv_cache,
            kv_cache.stride(0), kv_cache.stride(1),
            tables.runs, tables.runs.stride(0), tables.num_runs, tables.num_runs, 0,
            tables.items, tables.plan, tables.item_start,
            scratch.out, num_heads * d, d, scratch.lse, num_heads, 1,
            scratch.low, scratch.high, fmt.key_plane, fmt.value_plane, scale, tau_min, tau_max,
            0, 0, 1,
            D=d, BD=bd, GROUP=num_heads // kv_cache.shape[1], BM=16, BT=32 if bd > 128 else 64,
            KEY_BITS=fmt.key_plane.shape[0], VALUE_BITS=fmt.value_plane.shape[0],
            KEY_PLANES=page.key_planes, VALUE_PLANES=page.value_planes, SLOTS=page.slots,
            RANGE_OFFSET=page.range_offset // 2, HALF=tables.half_slots,
            MODE=mode, DECODE=True, DOT=DOT_DTYPE,
            WHOLE=fmt.whole_words, num_warps=4,
            num_stages=pipeline_stages(fmt, query.device),
        )  # fmt: skip
