"""prefill_attention and merge_parts against their float64 twins."""

import pytest
import torch

from csrc_triton import Turns, allocate_tables, build_tables, merge_parts, prefill_attention
from csrc_triton.attention import naive_visual_attention
from csrc_triton.merge import naive_merge
from tests.kernels.cases import (
    BLOCK,
    Pool,
    make_basis,
    make_format,
    make_format_on,
    make_request,
    on_device,
    relative_error,
    stale_table,
)


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize(("head_size", "bits", "group"), [(64, 1, 7), (80, 1, 1), (128, 2, 4)])
def test_later_chunks(head_size, bits, group, calibration):
    run_chunks(head_size, bits, group, calibration)


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("splits", [2, 16])
def test_shares_of_a_context(splits, calibration):
    run_chunks(64, 1, 7, calibration, splits=splits)


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("bits", [1, ((3, 2, 1, 0) * 16, (1, 0, 1, 0) * 16)], ids=["1", "mixed"])
def test_in_a_basis(bits, calibration):
    # The interpreter truncates to bfloat16, and float16 it rounds.
    run_chunks(64, bits, 7, calibration, dtype=torch.float16, in_basis=True)


def run_chunks(
    head_size, bits, group, calibration, device="cpu", splits=None, kernel="auto", lens_known=True,
    dtype=torch.bfloat16, key_bias=0.0, in_basis=False,
):  # fmt: skip
    fmt = make_format(head_size, bits, dtype)
    slots = fmt.page.slots
    pool = Pool(fmt, 1, 16, key_bias=key_bias)
    plans = [[1], [1, (slots, 0, slots), (2, 0, 2), 1, 1], [2, 1], [(3, 1, 2), 1, 1]]
    requests = [make_request(pool, plan) for plan in plans]
    query_lens = [1, 19, 5, 18]
    lens = [3] + [len(r) * BLOCK - 13 for r in requests[1:]]
    starts = torch.tensor([0, 1, 20, 25, 43], dtype=torch.int32)
    table = stale_table(requests, 40)
    tables = allocate_tables(max_num_reqs=4, max_num_blocks=40, max_num_tokens=64, slots=slots,
                             num_kv_heads=1, device=device)  # fmt: skip
    build_tables(tables, table.to(device), torch.tensor(lens, dtype=torch.int32, device=device),
                 starts.to(device), torch.full((43,), -1, dtype=torch.int64, device=device),
                 num_decodes=1)  # fmt: skip
    query = (2 * torch.randn(43, group, head_size, generator=pool.generator)).to(fmt.page.dtype)
    scale, turns = head_size**-0.5, None
    if in_basis:
        basis = make_basis(1, head_size, pool.generator, fmt.page.dtype)
        turns = Turns.of(on_device(basis, device), make_format_on(fmt, device))
        turned, shift = basis.query(query)

    def attend(text=None):
        # float32: the interpreter truncates to bfloat16
        out = torch.full(query.shape, float("nan"), device=device)
        lse = torch.full((group, 43), float("nan"), device=device)
        prefill_attention(
            tables, make_format_on(fmt, device), query.to(device), pool.cache.to(device),
            starts.to(device), out, lse, first_request=1, num_requests=3, max_query_len=19,
            query_lens=query_lens[1:] if lens_known else None, basis=turns, first_row=1,
            scale=scale, calibration=calibration, text=text, splits=splits, kernel=kernel,
        )  # fmt: skip
        assert out[0].isnan().all()  # a decode request: not ours
        return out.cpu(), lse.cpu()

    out, lse = attend()
    for r in (1, 2, 3):
        rows = slice(int(starts[r]), int(starts[r + 1]))
        context = lens[r] - query_lens[r]
        want, want_lse = naive_visual_attention(
            (turned if in_basis else query)[rows],
            *pool.tokens(requests[r], context, visual=True),
            scale,
            calibration,
        )
        if in_basis:
            want, want_lse = basis.output(want), want_lse + scale * shift[rows].T
        if r == 2:
            assert (out[rows] == 0).all() and lse[:, rows].isneginf().all()
        else:
            assert relative_error(out[rows], want) < 1e-2
            error = (lse[:, rows] - want_lse).abs()
            if key_bias:  # what the score of the bias loses, the part loses of its weight
                assert error.max() < 5e-2
            assert (error / want_lse.abs().clamp(min=1)).max() < 2e-2
    text = torch.randn(query.shape, generator=pool.generator)
    text_lse = 3 * torch.randn(lse.shape, generator=pool.generator)
    for rows, nothing in ((slice(3, 8), float("inf")), (slice(22, 24), float("-inf"))):
        text[rows], text_lse[:, rows] = float("nan"), nothing  # no keys
    want, want_lse = naive_merge([(out[1:], lse[:, 1:]), (text[1:], text_lse[:, 1:])])
    both, both_lse = attend((text.to(device), text_lse.to(device)))
    torch.testing.assert_close(both[1:].double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both_lse[:, 1:].double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_merge_parts(parts):
    g = torch.Generator().manual_seed(0)
    data = []
    for i in range(parts):
        lse = torch.randn(3, 5, generator=g) * 4
        lse[i, 1] = float("inf")  # FlashAttention's sign for no keys
        lse[:, 2] = float("-inf")
        x = torch.randn(5, 3, 80, generator=g)
        x[1, i] = float("nan")
        x[2] = float("nan")
        data.append((x, lse))
    out = torch.full((5, 3, 80), float("nan"))
    merge_parts(out, data)
    assert relative_error(out, naive_merge(data)[0]) < 1e-6
    assert (out[2] == 0).all()
    with pytest.raises(ValueError, match="parts"):
        merge_parts(out, data[:1])
