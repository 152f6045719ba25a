"""Prefill attention over cached visual pages: later chunks, prefix hits, next turns."""

from __future__ import annotations

import torch
import triton

from .attention import ATTEND, CALIBRATE, DOT_DTYPE, _attend_kernel
from .metadata import StepTables
from .tables import DeviceFormat, cache_words, pipeline_stages


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
) -> None:
    """Attention of many query tokens over the visual pages of their requests' contexts.

    Every query sees every visual token of its request's context (they all precede it), so there is
    no mask.  The result is one part of the softmax: merge it with :func:`csrc_triton.merge_parts`.

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
    """
    num_heads, d = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    if num_requests == 0 or max_query_len == 0:
        return
    page = fmt.page
    tau_min, tau_max = calibration or (0.0, 0.0)
    bd = triton.next_power_of_2(d)
    rows = max_query_len * group
    bm = 16 if rows <= 16 else 64
    _attend_kernel[(triton.cdiv(rows, bm), num_kv_heads, num_requests)](
        query, query.stride(0), query.stride(1), cache_words(kv_cache), kv_cache,
        kv_cache.stride(0), kv_cache.stride(1),
        tables.runs, tables.runs.stride(0), tables.num_runs, query_start_loc, first_request,
        tables.item_req, tables.item_run, tables.item_end, tables.plan, tables.item_start,
        out, out.stride(0), out.stride(1), lse, 1, lse.stride(0),
        lse, lse, fmt.key_plane, fmt.value_plane, scale, tau_min, tau_max,
        D=d, BD=bd, GROUP=group, BM=bm, BT=32 if bd > 128 else 64,
        KEY_BITS=fmt.key_plane.shape[0], VALUE_BITS=fmt.value_plane.shape[0],
        KEY_PLANES=page.key_planes, VALUE_PLANES=page.value_planes, SLOTS=page.slots,
        KEY_FULL=page.tile_slots(page.key_planes), VALUE_FULL=page.tile_slots(page.value_planes),
        RANGE_OFFSET=page.range_offset // 2, MODE=ATTEND if calibration is None else CALIBRATE,
        DECODE=False, DOT=DOT_DTYPE,
            WHOLE=d in (64, 128) and fmt.uniform_bits > 0, num_warps=4,
            num_stages=pipeline_stages(fmt),
    )  # fmt: skip
