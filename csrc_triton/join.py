"""Keys and values of prefills behind cached text: what is cached and what is new, in one piece.

New visual tokens are stored as codes, so they can be read exactly only from K and V in hand, and
the text before them, a system prompt perhaps, only from pages.  With both in one piece a single
call of FlashAttention does what else takes two and a merge.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .tables import BLOCK, cdiv, next_power_of_2

ROWS = 16
MAX_REQUESTS = 32
"""Most requests of a call: one compilation serves all numbers up to it."""


@triton.jit(
    do_not_specialize=["stride_table", "num_reqs"],
    do_not_specialize_on_alignment=["p_table", "p_query_start", "p_key_start"],
)
def _join_kernel(
    p_key, stride_kt, stride_kh, p_value, stride_vt, stride_vh,
    p_cache, stride_page, stride_head, stride_token, p_table, stride_table,
    p_query_start, p_key_start, num_reqs, p_keys, p_values,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(1)
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    o_req = tl.arange(0, BN)
    m_req = o_req < num_reqs
    ends = tl.load(p_key_start + 1 + o_req, mask=m_req, other=0)
    # Requests that end before a row; those without rows end where the one before them does.
    req = tl.sum(((ends[None, :] <= o_row[:, None]) & m_req[None, :]).to(tl.int32), 1)
    m_row = req < num_reqs
    req = tl.minimum(req, num_reqs - 1)
    key_start = tl.load(p_key_start + req)
    query_end = tl.load(p_query_start + req + 1)
    own = query_end - (tl.load(p_key_start + req + 1) - o_row)  # its row among the new tokens
    is_own = own >= tl.load(p_query_start + req)
    position = o_row - key_start
    m_cached = m_row & ~is_own
    m_own = m_row & is_own
    page = tl.load(
        p_table + req.to(tl.int64) * stride_table + position // BLOCK, mask=m_cached, other=0
    )
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    p_cached = p_cache + page.to(tl.int64) * stride_page + i_head * stride_head
    p_cached = (p_cached + (position % BLOCK) * stride_token)[:, None] + o_d[None, :]
    own = own.to(tl.int64)
    p_own = p_key + (own * stride_kt + i_head * stride_kh)[:, None] + o_d[None, :]
    key = tl.load(p_own, mask=m_own[:, None] & m_d, other=0)
    cached = tl.load(p_cached, mask=m_cached[:, None] & m_d, other=0)
    at = ((o_row.to(tl.int64) * HEADS + i_head) * D)[:, None] + o_d[None, :]
    m = m_row[:, None] & m_d
    tl.store(p_keys + at, tl.where(is_own[:, None], key, cached), mask=m)
    p_own = p_value + (own * stride_vt + i_head * stride_vh)[:, None] + o_d[None, :]
    value = tl.load(p_own, mask=m_own[:, None] & m_d, other=0)
    cached = tl.load(p_cached + D, mask=m_cached[:, None] & m_d, other=0)
    tl.store(p_values + at, tl.where(is_own[:, None], value, cached), mask=m)


def join_context(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_start_loc: torch.Tensor,
    num_keys: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cached and new keys and values of some requests, request by request.

    Parameters
    ----------
    key, value
        New ones, ``[num_tokens, Hkv, D]``.
    kv_cache
        ``[num_blocks, Hkv, 16, 2 D]``.
    block_table
        int32 ``[num_requests, blocks]``; what it says of cached tokens are pages of text.  At most
        :data:`MAX_REQUESTS`.
    query_start_loc
        int32 ``[num_requests + 1]``: where each request's new tokens begin.
    key_start_loc
        int32 ``[num_requests + 1]``: where each request's tokens, cached and new, begin in the
        result.
    num_keys
        Rows of the result, at least the last number of ``key_start_loc``; others are not written.

    Returns
    -------
    keys, values : torch.Tensor
        ``[num_keys, Hkv, D]``.
    """
    num_requests, (_, heads, d) = len(query_start_loc) - 1, key.shape
    keys, values = (x.new_empty(num_keys, heads, d) for x in (key, value))
    launch(
        _join_kernel, (cdiv(num_keys, ROWS), heads),
        key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1),
        kv_cache, *kv_cache.stride()[:3], block_table, block_table.stride(0),
        query_start_loc, key_start_loc, num_requests, keys, values,
        HEADS=heads, D=d, BD=next_power_of_2(d), BR=ROWS, BN=MAX_REQUESTS,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return keys, values


def naive_join(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_start_loc: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of :func:`join_context`, with as many rows as there are."""
    keys, values = [], []
    queries, ends = query_start_loc.tolist(), key_start_loc.tolist()
    d = key.shape[2]
    for r, pages in enumerate(block_table.tolist()):
        own = slice(queries[r], queries[r + 1])
        for t in range(ends[r + 1] - ends[r] - (own.stop - own.start)):
            row = kv_cache[pages[t // BLOCK], :, t % BLOCK]
            keys.append(row[None, :, :d])
            values.append(row[None, :, d:])
        keys.append(key[own])
        values.append(value[own])
    return torch.cat(keys), torch.cat(values)
