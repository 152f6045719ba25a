"""join_context against its twin."""

import pytest
import torch

from csrc_triton.join import join_context, naive_join

CASES = {
    "one": [(16, 40)],
    "some without a context, or a new token": [(5, 3), (0, 20), (33, 1), (17, 0), (2, 9)],
    "many": [(i % 7, 1 + i % 3) for i in range(32)],
}
"""Cached and new tokens of each request."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "head_size"), [(1, 80), (3, 64)])
def test_join(case, heads, head_size):
    run(CASES[case], heads, head_size)


def run(requests, heads, head_size, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    new = [n for _, n in requests]

    def starts(lengths):
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    fused = torch.randn(sum(new), 2 * heads, head_size, generator=generator).bfloat16()
    cache = torch.randn(40, heads, 16, 2 * head_size, generator=generator).bfloat16()
    table = torch.randint(0, 40, (len(requests), 7), generator=generator, dtype=torch.int32)
    keys = starts([c + n for c, n in requests])
    given = [*fused.split(heads, 1), cache, table, starts(new), keys]
    want = naive_join(*given)
    total = int(keys[-1])
    got = join_context(*(x.to(device) for x in given), total + 21)
    for x, y in zip(got, want, strict=True):
        assert x.shape[0] == total + 21
        assert torch.equal(x[:total].cpu(), y)
