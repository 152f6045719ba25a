"""Steps of the CUDA backend against the reference: what the host decides, without a GPU.

FlashAttention and vLLM's store are plain PyTorch here, and our kernels run under the interpreter.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils

import csrc_triton
from tests.test_warmup import make_parts, of_profile
from vllm_calibquant.attention.cpu import request_views
from vllm_calibquant.attention.reference import VisualPages, mixed_attention
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.block_rows import BlockRows
from vllm_calibquant.config import load_config
from vllm_calibquant.tags import tag

HEADS, KV_HEADS, BLOCK = 4, 2, 16
PAPER = {"preset": "calibquant-paper"}  # with calibration


def flash_attention(
    q, k, v, cu_seqlens_q, softmax_scale, causal, return_softmax_lse=False, seqused_k=None,
    cu_seqlens_k=None, block_table=None, out=None, **_,
):  # fmt: skip
    """What FlashAttention computes, request by request; nothing is said of rows without keys."""
    out = torch.empty_like(q) if out is None else out
    out.fill_(float("nan"))
    lse = torch.full((q.shape[1], q.shape[0]), float("inf"))
    starts = cu_seqlens_q.tolist()
    for r, (begin, end) in enumerate(pairwise(starts)):
        if block_table is None:
            rows = slice(*cu_seqlens_k[r : r + 2].tolist())
            keys, values = k[rows].float(), v[rows].float()
        else:
            pages, length = block_table[r].long() % len(k), int(seqused_k[r])  # stale past it
            keys, values = (x[pages].flatten(0, 1)[:length].float() for x in (k, v))
        n, t = len(keys), end - begin
        if n == 0 or t == 0:
            continue
        query = q[begin:end].float().unflatten(1, (k.shape[-2], -1))
        scores = torch.einsum("thgd,nhd->hgtn", query, keys) * softmax_scale
        if causal:
            scores.masked_fill_(torch.ones(t, n, dtype=torch.bool).triu(n - t + 1), float("-inf"))
        x = torch.einsum("hgtn,nhd->thgd", scores.softmax(-1), values)
        out[begin:end] = x.flatten(1, 2).to(out.dtype)
        lse[:, begin:end] = scores.logsumexp(-1).flatten(0, 1)
    return (out, lse) if return_softmax_lse else out


def store_text(self, layer, key, value, kv_cache, slot_mapping):
    """What vLLM's own store does."""
    for k, v, slot in zip(key, value, slot_mapping.tolist(), strict=True):
        assert slot < len(kv_cache) * BLOCK, "a visual token for a store that knows of none"
        kv_cache[slot // BLOCK, :, slot % BLOCK] = torch.cat([k, v], dim=-1)


@dataclass
class Server:
    """A layer with its cache, and requests whose blocks the test places."""

    builder: object
    layer: object
    rows: BlockRows
    kv_cache: torch.Tensor
    blocks: dict[int, list[int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def place(self, row: int, ids: list[int], cached: int | None = None) -> None:
        """Give a request more blocks; with ``cached`` it is a new one, with so many tokens."""
        if cached is not None:
            self.blocks[row], self.lengths[row] = [], cached
        self.rows.append(row, (ids,), overwrite=cached is not None)
        self.blocks[row] += ids

    def step(self, new: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute so many new tokens of each request: what the layer gives, and the reference."""
        impl, tokens = self.layer.impl, sum(new.values())
        starts = torch.tensor([0, *new.values()], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for row, n in new.items():
            self.lengths[row] += n
        lengths = torch.tensor([self.lengths[row] for row in new], dtype=torch.int32)
        table = torch.full((len(new), 64), 7 << 23, dtype=torch.int32)  # stale
        slots = []
        for i, (row, n) in enumerate(new.items()):
            ids = self.blocks[row]
            table[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            positions = range(self.lengths[row] - n, self.lengths[row])
            slots += [ids[p // BLOCK] * BLOCK + p % BLOCK for p in positions]
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(new),
            num_actual_tokens=tokens,
            max_query_len=max(new.values()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
            req_idx=np.array(list(new)),
        )
        sizes = (HEADS, KV_HEADS, KV_HEADS)
        shape = (tokens, sum(sizes), impl.head_size)
        query, key, value = torch.randn(shape, generator=self.generator).half().split(sizes, 1)
        metadata = self.builder.build(0, common)
        assert metadata.visual
        output = torch.full_like(query, float("nan"))
        impl.forward(self.layer, query, key, value, self.kv_cache, metadata, output)

        fmt, d = impl.page_format.page, impl.head_size
        raw, slot = self.kv_cache.view(torch.uint8).flatten(2), torch.arange(fmt.tokens) // BLOCK
        expected = torch.empty(output.shape)
        for view in request_views(table, starts, lengths, block_size=BLOCK, slots=fmt.slots):
            text = self.kv_cache[view.text_pages].transpose(1, 2).flatten(0, 1)[view.text_tokens]
            seen = VisualPages(raw[view.visual_pages], view.visual_slots[:, slot])
            expected[view.tokens] = mixed_attention(
                query[view.tokens],
                torch.cat([text[..., :d], key[view.tokens]]),
                torch.cat([text[..., d:], value[view.tokens]]),
                seen if len(view.visual_pages) else None,
                page_format=fmt,
                scale=impl.scale,
                calibration=impl.calibration,
                basis=impl.codec.basis,
            )
        return output.float(), expected


def of_width(bits: int, **settings: Any) -> Codec:
    config = load_config(f"calibquant{bits}", {"calibquant": settings})
    return Codec.of(config, 2, 64, torch.float16)


@pytest.fixture(params=["1 bit", "2 bits, calibrated", "1 bit, transformed", "profile"])
def server(request, monkeypatch) -> Server:
    codec, settings = {
        "1 bit": (of_width(1), {}),
        "2 bits, calibrated": (of_width(2), PAPER),
        "1 bit, transformed": (of_width(1, transform="hadamard"), {}),
        "profile": (of_profile(64, torch.float16), {}),
    }[request.param]
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attention, raising=False)
    cuda = importlib.import_module("vllm_calibquant.attention.cuda")
    rows = BlockRows()
    monkeypatch.setattr(cuda, "flash_attn_varlen_func", flash_attention)
    monkeypatch.setattr(cuda, "BLOCK_ROWS", rows)
    monkeypatch.setattr(cuda.FlashAttentionImpl, "do_kv_cache_update", store_text)
    builder, layer = make_parts(
        cuda, monkeypatch, codec, HEADS, KV_HEADS, settings, dtype=torch.float16, num_sms=2
    )
    cache = torch.full((24, KV_HEADS, BLOCK, 2 * 64), float("nan"), dtype=torch.float16)
    return Server(builder, layer, rows, cache)


def test_steps_of_a_chat_about_an_image(server: Server, monkeypatch):
    text = iter(range(1, 20))

    def pages(n: int) -> list[int]:
        return [next(text) for _ in range(n)]

    def check(apart: bool = False, **new: int) -> None:
        few_rows = 0 if apart else 2048  # decodes go with prefills where those are few
        monkeypatch.setattr("vllm_calibquant.attention.cuda.FEW_ROWS", few_rows)
        ours, expected = server.step({int(row[1:]): n for row, n in new.items()})
        cosine = torch.cosine_similarity(ours.flatten(1), expected.flatten(1), dim=-1)
        assert cosine.min() > 0.9995, new
        assert (ours - expected).norm() < 1e-2 * expected.norm(), new

    slots = server.layer.impl.page_format.page.slots
    begin, first, second = pages(2), [tag(20, s) for s in range(slots)], [tag(21, 0), tag(21, 1)]
    server.place(0, [*begin, *first], cached=0)
    check(r0=32 + 16 * slots)  # text, and a chunk of an image
    server.place(0, [*second, *pages(1)])
    server.place(1, pages(2), cached=0)
    check(r0=32 + 5, r1=20)  # the rest of the image and text, beside text
    check(r0=1, r1=1)
    server.place(2, [*begin, *first, *second, *pages(2)], cached=32 + 16 * (slots + 2))
    check(r0=1, r1=1, r2=19)  # a question that hits the image in the prefix cache
    server.place(3, pages(1), cached=0)
    check(apart=True, r0=1, r2=1, r3=11)  # text alone, beside decodes that read codes
    server.place(2, pages(1))
    check(r2=9, r3=2)  # the next turn
    server.place(4, [*begin, *first, tag(22, 0), tag(22, 1)], cached=32 + 16 * slots)
    check(r0=1, r1=1, r4=32)  # another image after a hit
    server.place(4, pages(1))
    check(apart=True, r0=1, r1=1, r4=5)  # a question about it


@pytest.mark.parametrize("beside", [False, True])
def test_images_behind_cached_text(server: Server, monkeypatch, beside):
    """A system prompt hits, and what comes behind it is attended to in one piece."""
    calls = []
    join = csrc_triton.join_context
    monkeypatch.setattr(csrc_triton, "join_context", lambda *a: calls.append(a[-1]) or join(*a))
    server.kv_cache[:20].normal_(generator=server.generator)  # what is cached
    server.place(0, [1, tag(20, 0), tag(20, 1), 2], cached=16)
    server.place(1, [1, 3, tag(21, 0), tag(21, 1), 4], cached=0)
    server.place(2, [5, 6], cached=17)
    new = {0: 37, 1: 70} | ({2: 1} if beside else {})  # a decode of text goes with them
    ours, expected = server.step(new)
    assert (ours - expected).norm() < 5e-3 * expected.norm()
    assert calls == [16 + 37 + 70 + 18 * beside]
    server.place(0, [tag(22, 0), tag(22, 1)])
    server.place(3, [1, 7, 8, tag(23, 0), tag(23, 1)], cached=48)
    ours, expected = server.step({0: 43, 3: 32})  # one has codes before its new image
    assert (ours - expected).norm() < 1e-2 * expected.norm()
    server.place(3, [9])
    server.step({3: 16})
    assert len(calls) == 1
    server.place(4, [1, 7, 8, tag(19, 0), tag(19, 1)], cached=48)
    server.step({4: 32})  # more is cached than new
    assert len(calls) == 1
