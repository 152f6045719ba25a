"""encode, turn_query and merge_turned against the basis in plain PyTorch."""

import pytest
import torch

from csrc_triton import basis as kernels
from csrc_triton.basis import Turns, encode, merge_turned, spread_query, turn_query
from csrc_triton.merge import naive_merge
from tests.kernels.cases import (
    counted_bits,
    make_basis,
    make_format,
    make_format_on,
    on_device,
    relative_error,
)
from vllm_calibquant.tags import is_visual, tag


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_encoded_keys_and_values(head_size):
    run_encode(head_size)


def run_encode(head_size, device="cpu"):
    heads, pages = 2, [3, tag(1, 0), tag(1, 5), 4, 4, 5, 6, 7, tag(2, 3)]
    generator = torch.Generator().manual_seed(head_size)
    basis = on_device(make_basis(heads, head_size, generator), device)
    slots = torch.tensor([16 * page + t for page in pages for t in range(16)])
    slots[3 * 16 : 4 * 16] = -1  # of no token
    slots = slots[5:].to(device)  # a tile of text alone, and one that begins in the middle
    n = len(slots)
    assert not is_visual(slots[64:-16] // 16).any()
    both = torch.randn(n, 2 * heads, head_size, generator=generator).bfloat16().to(device)
    key, value = both.split(heads, 1)
    coded = is_visual(slots // 16)
    for got, x, part in zip(
        encode(key, value, slots, basis), (key, value), (basis.key, basis.value), strict=True
    ):
        assert got.dtype == x.dtype and got.is_contiguous()
        assert torch.equal(got[~coded], x[~coded])
        assert relative_error(got[coded], part.encode(x)[coded]) < 6e-3


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("head_size", "group", "tokens"), [(64, 7, 5), (80, 1, 3), (128, 4, 17)])
def test_turned_queries_and_outputs(head_size, group, tokens, many, monkeypatch):
    if many:
        monkeypatch.setattr(kernels, "MANY_TOKENS", tokens)
    run(head_size, group, tokens)


def run(head_size, group, tokens, device="cpu"):
    heads = 2
    generator = torch.Generator().manual_seed(head_size)
    basis = on_device(make_basis(heads, head_size, generator), device)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    wide = numbers(tokens, heads * group, head_size + 8).bfloat16()  # a strided view, as of a QKV
    query = wide[..., :head_size]
    bits = counted_bits(head_size, head_size - 4, head_size // 2, 14, 6)
    fmt = make_format_on(make_format(head_size, (bits, bits)), device)
    turns = Turns.of(basis, fmt)
    turned, shift, planes = turn_query(query, turns)
    if head_size == 80:  # no kernel reads its planes
        assert planes.shape[2] == 0
    else:
        assert planes.shape[2] == fmt.page.key_planes > sum(bits)
        real, want = fmt.key_weights != 0, spread_query(turned, fmt)
        assert not planes[..., ~real].any() and not want[..., ~real].any()
        # Without the powers of two, so that each plane counts alike.
        unfolded, want = (x[..., real] / fmt.key_weights[real] for x in (planes, want))
        assert relative_error(unfolded, want) < 6e-3
    one_width = make_format_on(make_format(head_size, 1), device)
    plain = turn_query(query, Turns.of(basis, one_width))
    assert plain[2].shape[2] == 0 and torch.equal(plain[0], turned) and torch.equal(plain[1], shift)
    want, want_shift = basis.query(query)
    assert turned.dtype == query.dtype and relative_error(turned, want) < 6e-3
    assert relative_error(shift, want_shift.T) < 2e-3

    codes, text = numbers(tokens, heads * group, head_size), numbers(*query.shape).bfloat16()
    lse, text_lse = 3 * numbers(2, heads * group, tokens)
    lse[:, 0], text_lse[:, 1] = float("-inf"), float("inf")  # no visual tokens, no text
    text[1] = float("nan")
    out = torch.full_like(text, float("nan"), dtype=torch.float32)
    merge_turned(out, (codes, lse), shift, turns, (text, text_lse), scale=0.1)
    parts = [(basis.output(codes), lse + 0.1 * want_shift.T), (text, text_lse)]
    assert relative_error(out, naive_merge(parts)[0]) < 3e-3
    assert torch.equal(out[0], text[0].float())
