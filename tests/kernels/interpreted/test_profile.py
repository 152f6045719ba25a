"""The CUDA backend's steps with a profile, against the plain reference on the same numbers.

Store codes rows that the basis has turned, decode reads them with turned queries, and what comes
back is turned again before it is merged with the text part.
"""

from dataclasses import replace

import pytest
import torch

from csrc_triton import (
    DeviceFormat,
    Turns,
    allocate_scratch,
    allocate_tables,
    build_tables,
    decode_attention,
    encode,
    prefill_attention,
    store,
)
from csrc_triton.attention import naive_visual_attention
from tests.kernels.cases import relative_error
from tests.test_profile import MODEL, make_profile
from vllm_calibquant.attention.reference import Calibration, VisualPages, mixed_attention
from vllm_calibquant.attention.store import Codec, store_visual
from vllm_calibquant.tags import tag

HEADS, GROUP, D = 2, 3, 64
BITS = ((4,) * 4 + (3,) * 8 + (2,) * 16 + (1,) * 24 + (0,) * 12, (2,) * 16 + (1,) * 32 + (0,) * 16)


@pytest.mark.parametrize("calibration", [None, (0.5, 2.0)])
def test_store_and_attention_in_a_basis(calibration):
    model = replace(MODEL, head_size=D, num_kv_heads=HEADS)
    profile = make_profile(model, [BITS, ((2,) * 64, (1,) * 64)])
    # The interpreter truncates to bfloat16, and float16 it rounds.
    codec = Codec.of_profile(profile, 0, slice(0, HEADS), torch.float16)
    page = codec.page_format
    assert page.slots == 9 - 1  # the other layer's, though this one alone would fit 10
    clips = [tuple(e.factor.tolist()) for e in (codec.key_estimator, codec.value_estimator)]
    fmt = DeviceFormat(page, "cpu", *clips)
    generator = torch.Generator().manual_seed(1)

    ids = [tag(1, s) for s in range(3)] + [2]
    mapping = torch.tensor([i * 16 + t for i in ids for t in range(16)])
    n = len(mapping)
    key, value = (torch.randn(n, HEADS, D, generator=generator).half() for _ in range(2))
    query = torch.randn(n, HEADS * GROUP, D, generator=generator).half()
    shape = (4, HEADS, 16, 2 * D)
    cache = torch.full((4, HEADS, page.head_bytes), 0xFF, dtype=torch.uint8)
    cache = cache.view(torch.float16).view(shape)
    tables = allocate_tables(max_num_reqs=1, max_num_blocks=4, max_num_tokens=n, slots=page.slots,
                             num_kv_heads=HEADS, device="cpu", num_sms=2)  # fmt: skip
    table = torch.tensor([ids], dtype=torch.int32)

    def step(tokens, mapping, decodes):
        build_tables(tables, table, torch.tensor([n], dtype=torch.int32),
                     torch.tensor([0, tokens], dtype=torch.int32), mapping,
                     num_decodes=decodes)  # fmt: skip

    step(n, mapping, 0)
    basis = codec.basis
    store(tables, fmt, *encode(key, value, mapping, basis), cache, mapping)
    twin = torch.full((4, HEADS, page.head_bytes), 0xFF, dtype=torch.uint8)
    store_visual(key[:48], value[:48], twin, mapping[:48], codec)
    got, want = (page.unpack(x.flatten(1).view(torch.uint8).view(4, HEADS, -1)[1]) for x in
                 (cache.clone(), twin))  # fmt: skip
    assert torch.equal(cache[2, :, :, :D].transpose(0, 1), key[48:])
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a[:, :48] != b[:, :48]).double().mean() < 1e-3  # numbers on a threshold
    assert relative_error(got[2], want[2]) < 1e-3

    used = torch.zeros(1, page.tokens, dtype=torch.bool)
    used[0, :48] = True
    pages = cache.contiguous().view(torch.uint8).view(4, HEADS, -1)[1:2]
    scale = D**-0.5
    for rows in (1, 5):  # one decode, then a prefill of five tokens behind 59 cached ones
        expected = mixed_attention(
            query[-rows:], key[48:], value[48:], VisualPages(pages, used), page_format=page,
            scale=scale, calibration=Calibration(*calibration) if calibration else None,
            basis=basis,
        )  # fmt: skip
        ends = range(n - rows + 1, n + 1)
        parts = [
            naive_visual_attention(q[None], key[48:end], value[48:end], scale)
            for q, end in zip(query[-rows:], ends, strict=True)
        ]
        text = torch.cat([x for x, _ in parts]).half(), torch.cat([x for _, x in parts], 1)
        text = text[0], text[1].float()
        out = torch.empty_like(query[-rows:])
        step(rows, mapping[-rows:], int(rows == 1))
        if rows == 1:
            scratch = allocate_scratch(tables, HEADS * GROUP, D)
            decode_attention(tables, scratch, fmt, query[-1:], cache, out, scale=scale,
                             calibration=calibration, text=text, basis=Turns.of(basis, fmt),
                             kernel="triton")  # fmt: skip
        else:
            prefill_attention(tables, fmt, query[-rows:], cache,
                              torch.tensor([0, rows], dtype=torch.int32), out,
                              torch.empty(HEADS * GROUP, rows), first_request=0, num_requests=1,
                              max_query_len=rows, scale=scale, calibration=calibration, text=text,
                              basis=Turns.of(basis, fmt))  # fmt: skip
        assert relative_error(out, expected) < 1e-2
