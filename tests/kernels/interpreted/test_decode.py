"""decode_attention (plain Triton), with calibration and text part, against the float64 twin."""

import pytest
import torch

from csrc_triton import Turns, allocate_scratch, allocate_tables, build_tables, decode_attention
from csrc_triton.attention import naive_visual_attention
from csrc_triton.merge import naive_merge
from tests.kernels.cases import (
    BLOCK,
    Pool,
    counted_bits,
    make_basis,
    make_format,
    make_format_on,
    make_request,
    on_device,
    relative_error,
    stale_table,
)

PLANS = [
    [1, (3, 0, 3), 2],  # partly full page
    [2],  # no visual part
    [1, (5, 2, 3), (4, 0, 4), 1, (4, 0, 2), 1],  # run beginning in mid-page, run that ends early
    [1],  # one token
]

PROFILES = {
    "192 + 128 planes": (128, (98, 60, 26, 8), (88, 30, 10), 11, 7),
    "160 + 96 planes": (128, (92, 46, 22), (66, 20, 8, 2), 14, 1),
    "256 + 128 planes": (128, (118, 80, 40, 18), (100, 28), 9, 4),
    "64 + 160 planes, 64 channels": (64, (38, 20, 6), (60, 54, 34, 12), 8, 8),
    "192 + 64 planes, 64 channels": (64, (64, 60, 50, 18), (42, 16, 6), 7, 3),
}
"""Head size, components with more than 0, 1, 2, 3 bits of K and V, sub-slots, query group."""


def profile_shape(case):
    """Head size, and bits of the components of K and of V."""
    head_size, *counts, _, _ = PROFILES[case]
    return head_size, tuple(counted_bits(head_size, *c) for c in counts)


def run(fmt, *, group, heads=2, plans=None, calibration=None, with_text=True, sms=3,
        kernel="triton", device="cpu", spread=1.0, in_basis=False, key_bias=0.0):  # fmt: skip
    limit = fmt.page.slots
    plans = [
        [p if isinstance(p, int) else (min(p[0], limit), min(p[1], limit - 1),
                                       min(p[2], limit - min(p[1], limit - 1))) for p in plan]
        for plan in plans or PLANS
    ]  # fmt: skip
    pages = sum(sum(p if isinstance(p, int) else 1 for p in plan) for plan in plans) + 1
    pool = Pool(fmt, heads, pages, key_bias=key_bias)
    requests = [make_request(pool, plan) for plan in plans]
    lens = [len(r) * BLOCK - 7 for r in requests]
    lens[-1] = 1 if requests[-1] and len(requests[-1]) == 1 else lens[-1]
    b, d = len(requests), fmt.page.head_size
    table = stale_table(requests, max(map(len, requests)) + 4)
    tables = allocate_tables(max_num_reqs=b, max_num_blocks=table.shape[1], max_num_tokens=64,
                             slots=fmt.page.slots, num_kv_heads=heads, device=device, num_sms=sms,
                             programs_per_sm=1)  # fmt: skip
    lens_t = torch.tensor(lens, dtype=torch.int32)
    build_tables(
        tables, table.to(device), lens_t.to(device),
        torch.arange(b + 1, dtype=torch.int32, device=device),
        torch.full((b,), -1, dtype=torch.int64, device=device), num_decodes=b,
    )  # fmt: skip
    hq = heads * group
    query = (torch.randn(b, hq, d, generator=pool.generator) * spread).to(fmt.page.dtype)
    scale = d**-0.5
    basis = make_basis(heads, d, pool.generator, fmt.page.dtype) if in_basis else None
    coded, shift = basis.query(query) if basis else (query, query.new_zeros(b, hq))
    want, want_lse, text_out, text_lse = [], [], [], []
    for i, ids in enumerate(requests):
        visual = naive_visual_attention(coded[i : i + 1], *pool.tokens(ids, lens[i], visual=True),
                                        scale, calibration)  # fmt: skip
        if basis:
            visual = basis.output(visual[0]), visual[1] + scale * shift[i][:, None]
        text = naive_visual_attention(query[i : i + 1], *pool.tokens(ids, lens[i], visual=False),
                                      scale)  # fmt: skip
        out, lse = naive_merge([visual, text] if with_text else [visual])
        want.append(out)
        want_lse.append(lse)
        text_out.append(text[0])
        text_lse.append(text[1])
    scratch = allocate_scratch(tables, hq, d, 0 if fmt.uniform_bits else fmt.page.value_planes)
    for x in (scratch.out, scratch.lse, scratch.low, scratch.high):
        x.fill_(float("nan"))
    out = torch.full((b, hq, d), float("nan"), dtype=fmt.page.dtype, device=device)
    lse = torch.full((hq, b), float("nan"), device=device)
    text = None
    if with_text:
        text = (torch.cat(text_out).to(fmt.page.dtype).to(device),
                torch.cat(text_lse, 1).float().to(device))  # fmt: skip
    fmt = make_format_on(fmt, device)
    turns = Turns.of(on_device(basis, device), fmt) if basis else None
    decode_attention(tables, scratch, fmt, query.to(device),
                     pool.cache.to(device), out, scale=scale,
                     calibration=calibration, text=text, lse=lse, kernel=kernel,
                     basis=turns)  # fmt: skip
    want, want_lse = torch.cat(want), torch.cat(want_lse, 1)
    assert relative_error(out, want) < 1e-2
    finite = want_lse.isfinite()
    assert torch.equal(lse.cpu().isneginf(), ~finite)
    error = (lse.cpu()[finite] - want_lse[finite]).abs()
    if key_bias:  # what the score of the bias loses, the part loses of its weight
        assert error.max() < 5e-2
    assert (error / want_lse[finite].abs().clamp(min=1)).max() < 2e-2
    return out


@pytest.mark.parametrize("head_size", [64, 80, 96, 112, 128, 256])
def test_head_sizes(head_size):
    run(make_format(head_size), group=2, heads=1, plans=PLANS[:3])


@pytest.mark.parametrize("group", [1, 7, 16])
@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
def test_query_groups(group, calibration):
    run(make_format(64), group=group, calibration=calibration, spread=3.0)


@pytest.mark.parametrize("bits", [2, 4, ((4, 3, 3, 2) * 16, (2, 1, 1, 0) * 16)])
def test_widths(bits):
    run(make_format(64, bits), group=3, calibration=(0.0, 3.0), plans=PLANS[:3])


@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("bits", [1, ((3, 2, 1, 0) * 16, (2, 1, 1, 0) * 16)])
def test_in_a_basis(bits, with_text):
    run(make_format(64, bits), group=3, calibration=(0.0, 3.0), with_text=with_text, in_basis=True)


def test_float16():
    run(make_format(128, 1, torch.float16), group=4, plans=PLANS[:2])


def test_without_text_part():
    run(make_format(64), group=4, with_text=False, calibration=(0.5, 2.0))


def test_narrow_scores_do_not_reverse():
    run(make_format(64), group=4, calibration=(0.0, 3.0), spread=0.01)


@pytest.mark.parametrize("sms", [1, 40])
def test_many_and_few_items(sms):
    run(make_format(64), group=2, sms=sms, plans=[[1, *[(2, 0, 2)] * 5, 1], [(1, 0, 1), 1]],
        calibration=(0.0, 3.0))  # fmt: skip


def test_refuses_wide_groups():
    with pytest.raises(ValueError, match="at most 16"):
        run(make_format(64), group=17, heads=1, plans=PLANS[:1])


def run_graph(fmt, *, group, heads, in_basis=False):
    """Capture with dummy tables (no tag anywhere), replay with real ones: equal to eager."""
    device = "cuda"
    pool = Pool(fmt, heads, 24)
    plans = [[1, (14, 0, 14), (14, 3, 11), 1], [1, (9, 0, 9), 1, (14, 0, 14), 1], [3]]
    requests = [make_request(pool, plan) for plan in plans]
    table = stale_table(requests, 48).to(device)
    d, hq, b = fmt.page.head_size, heads * group, len(plans)
    real_lens = torch.tensor(
        [len(r) * BLOCK - 3 for r in requests], dtype=torch.int32, device=device
    )
    tables = allocate_tables(max_num_reqs=b, max_num_blocks=48, max_num_tokens=64,
                             slots=fmt.page.slots, num_kv_heads=heads, device=device)  # fmt: skip
    scratch = allocate_scratch(tables, hq, d, 0 if fmt.uniform_bits else fmt.page.value_planes)
    fmt, cache = make_format_on(fmt, device), pool.cache.to(device)
    query = torch.randn(b, hq, d, device=device, dtype=cache.dtype)
    starts = torch.arange(b + 1, dtype=torch.int32, device=device)
    mapping = torch.full((b,), -1, dtype=torch.int64, device=device)
    in_table, in_lens = torch.zeros_like(table), torch.ones_like(real_lens)
    out = torch.empty_like(query)
    turns = None
    if in_basis:
        turns = Turns.of(on_device(make_basis(heads, d, pool.generator), device), fmt)

    def step(target, calibration):
        build_tables(tables, in_table, in_lens, starts, mapping, num_decodes=b)
        decode_attention(tables, scratch, fmt, query, cache, target, scale=d**-0.5,
                         calibration=calibration, basis=turns)  # fmt: skip

    for calibration in (None, (0.0, 3.0)):
        in_table.zero_()
        in_lens.fill_(1)
        step(out, calibration)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(out, calibration)
        in_table.copy_(table)
        for lens in (real_lens, real_lens - 16, real_lens.flip(0).minimum(real_lens)):
            in_lens.copy_(lens)
            out.fill_(float("nan"))
            graph.replay()
            eager = torch.full_like(out, float("nan"))
            step(eager, calibration)
            assert torch.equal(out, eager)
            assert out.isfinite().all()
