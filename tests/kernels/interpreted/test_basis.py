"""turn_query and merge_turned against the basis in plain PyTorch."""

import pytest
import torch

from csrc_triton.basis import Turns, merge_turned, spread_query, turn_query
from csrc_triton.merge import naive_merge
from tests.kernels.cases import (
    counted_bits,
    make_basis,
    make_format,
    make_format_on,
    on_device,
    relative_error,
)


@pytest.mark.parametrize(("head_size", "group", "tokens"), [(64, 7, 5), (80, 1, 3), (128, 4, 9)])
def test_turned_queries_and_outputs(head_size, group, tokens):
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
