"""Range estimators and rounding against loops over single numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_calibquant.quantize import (
    RANGE_ESTIMATORS,
    Midpoint,
    MinMax,
    Quantile,
    TwoMeans,
    UnbiasedSlope,
    encode,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE = torch.ones(())  # levels of 1 bit, of any number of components


def group(tokens: int, channels: int, seed: int, absent: int = 0) -> tuple[torch.Tensor, ...]:
    """``x`` float32 ``[tokens, D]`` with channels of very different offsets, and ``valid``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x = x * torch.rand(channels, generator=generator).mul(4).exp()
    x = x + torch.randn(channels, generator=generator) * 10
    valid = torch.ones(tokens, 1, dtype=torch.bool)
    valid[torch.randperm(tokens, generator=generator)[:absent]] = False
    return x.masked_fill(~valid, float("nan")), valid


def linear_quantile(values: list[float], share: float) -> float:
    """Quantile with linear interpolation between order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


groups = st.builds(
    lambda tokens, channels, seed, share: group(tokens, channels, seed, int(share * (tokens - 1))),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 999),
    st.floats(0, 1),
)


@settings(max_examples=100, deadline=None)
@given(x_valid=groups, factor=st.sampled_from([1.0, 0.5, 0.3]))
def test_minmax(x_valid, factor):
    x, valid = x_valid
    lo, hi = MinMax(factor)(x, valid, ONE)
    for j in range(x.shape[1]):
        values = [x[t, j] for t in range(len(x)) if valid[t]]
        assert lo[0, j] == min(values) * factor
        assert hi[0, j] == max(values) * factor


@settings(max_examples=100, deadline=None)
@given(
    x_valid=groups,
    factor=st.sampled_from([1.0, 0.5]),
    alpha=st.sampled_from([0.0, 0.02, 0.1, 0.25]),
)
def test_quantile(x_valid, factor, alpha):
    x, valid = x_valid
    lo, hi = Quantile(factor, alpha)(x, valid, ONE)
    for j in range(x.shape[1]):
        values = [x[t, j].item() for t in range(len(x)) if valid[t]]
        assert lo[0, j].item() == pytest.approx(
            factor * linear_quantile(values, alpha), rel=1e-5, abs=1e-5
        )
        assert hi[0, j].item() == pytest.approx(
            factor * linear_quantile(values, 1 - alpha), rel=1e-5, abs=1e-5
        )


def test_a_quantile_of_zero_is_the_extreme():
    x, valid = group(30, 5, seed=3, absent=10)
    for a, b in zip(Quantile(0.5, 0.0)(x, valid, ONE), MinMax(0.5)(x, valid, ONE), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=100, deadline=None)
@given(x_valid=groups, factor=st.sampled_from([1.0, 0.6, 0.3]))
def test_midpoint(x_valid, factor):
    x, valid = x_valid
    lo, hi = Midpoint(factor)(x, valid, ONE)
    for j in range(x.shape[1]):
        values = [x[t, j].item() for t in range(len(x)) if valid[t]]
        middle, half = (min(values) + max(values)) / 2, (max(values) - min(values)) / 2
        close = {"rel": 1e-5, "abs": 1e-6 * max(map(abs, values))}
        assert lo[0, j].item() == pytest.approx(middle - factor * half, **close)
        assert hi[0, j].item() == pytest.approx(middle + factor * half, **close)


@pytest.mark.parametrize("estimator", [Midpoint(0.6), TwoMeans(), UnbiasedSlope()])
def test_a_bias_moves_the_range_along(estimator):
    """Keys with a large bias; the paper's ranges, drawn towards zero, lose such channels."""
    x, valid = group(60, 4, seed=1)
    lo, hi = estimator(x, valid, ONE)
    moved_lo, moved_hi = estimator(x + 1000, valid, ONE)
    torch.testing.assert_close(moved_lo, lo + 1000, rtol=0, atol=1e-2)
    torch.testing.assert_close(moved_hi, hi + 1000, rtol=0, atol=1e-2)
    x = x + 1000
    codes, _, _ = encode(x, valid, torch.ones(4, dtype=torch.long), estimator, torch.float32)
    assert ((codes.float().mean(0) > 0) & (codes.float().mean(0) < 1)).all()
    lost, _, _ = encode(x, valid, torch.ones(4, dtype=torch.long), MinMax(0.5), torch.float32)
    assert (lost.float().mean(0) == 1).all()


@pytest.mark.parametrize("name", ["minmax", "midpoint", "quantile"])
def test_weights_say_what_the_estimator_does(name):
    """Kernels know an estimator by two weights of two order statistics."""
    x, valid = group(50, 6, seed=4, absent=7)
    estimator = RANGE_ESTIMATORS[name](0.4)
    a, b = estimator.weights
    low, high = RANGE_ESTIMATORS["quantile" if name == "quantile" else "minmax"]()(x, valid, ONE)
    lo, hi = estimator(x, valid, ONE)
    torch.testing.assert_close(lo, a * low + b * high)
    torch.testing.assert_close(hi, a * high + b * low)


def test_two_means_are_means_of_either_side():
    x, valid = group(200, 6, seed=5, absent=20)
    lo, hi = TwoMeans()(x, valid, ONE)
    for j in range(6):
        column = x[valid[:, 0], j]
        below = column < (lo[0, j] + hi[0, j]) / 2
        assert lo[0, j].item() == pytest.approx(column[below].mean().item(), rel=1e-2)
        assert hi[0, j].item() == pytest.approx(column[~below].mean().item(), rel=1e-2)


def error_and_slope(estimator, x, valid, bits):
    """Squared error of what is read, and its slope against what was stored, per channel."""
    width = torch.full(x.shape[-1:], bits)
    codes, scale, offset = encode(x, valid, width, estimator, torch.float32)
    read = (offset + scale * codes)[valid[:, 0]]
    x = x[valid[:, 0]]
    deviation = x - x.mean(0)
    slope = (deviation * (read - read.mean(0))).sum(0) / deviation.square().sum(0)
    return (read - x).square().mean(0), slope


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_least_squares_and_unbiased_slope(bits):
    x, valid = group(200, 16, seed=6, absent=20)
    least, slope = error_and_slope(TwoMeans(), x, valid, bits)
    for other in (MinMax(), MinMax(0.5), Midpoint(0.6), Midpoint(0.8), Quantile(), UnbiasedSlope()):
        error, _ = error_and_slope(other, x, valid, bits)
        assert (error / least).mean() >= 1  # in one channel or another Lloyd's may stop early
    if bits == 1:
        assert (slope < 0.9).all()
    _, slope = error_and_slope(UnbiasedSlope(), x, valid, bits)
    torch.testing.assert_close(slope, torch.ones(16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RANGE_ESTIMATORS)
def test_one_token_is_kept(name):
    x, valid = group(5, 6, seed=7, absent=4)
    bits = torch.ones(6, dtype=torch.long)
    codes, scale, offset = encode(x, valid, bits, RANGE_ESTIMATORS[name](), torch.float32)
    read = (offset + scale * codes)[valid[:, 0]]
    torch.testing.assert_close(read, x[valid[:, 0]])


@pytest.mark.parametrize("name", RANGE_ESTIMATORS)
def test_estimators_treat_groups_apart(name):
    """Leading dimensions are pages and heads: each has ranges of its own."""
    parts = [group(20, 8, seed, absent=seed) for seed in range(6)]
    x, valid = (torch.stack(p).unflatten(0, (2, 3)) for p in zip(*parts, strict=True))
    lo, hi = RANGE_ESTIMATORS[name](0.7)(x, valid, ONE)
    assert lo.shape == hi.shape == (2, 3, 1, 8)
    for i, part in enumerate(parts):
        alone = RANGE_ESTIMATORS[name](0.7)(*part, ONE)
        torch.testing.assert_close(lo[i // 3, i % 3], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hi[i // 3, i % 3], alone[1], rtol=1e-5, atol=1e-5)


def rounded(value: np.float32, dtype: torch.dtype) -> np.float32:
    """The nearest number of a dtype."""
    return torch.tensor(value).to(dtype).float().numpy()[()]


@settings(max_examples=150, deadline=None)
@given(
    x_valid=groups,
    seed=st.integers(0, 99),
    factor=st.sampled_from([1.0, 0.5, 0.3]),
    dtype=st.sampled_from(DTYPES),
)
def test_encode(x_valid, seed, factor, dtype):
    x, valid = x_valid
    channels = x.shape[1]
    widths = np.random.default_rng(seed).choice([0, 1, 2, 4], channels)
    codes, scale, offset = encode(x, valid, torch.from_numpy(widths), MinMax(factor), dtype)
    assert (codes.dtype, scale.dtype, offset.dtype) == (torch.uint8, dtype, dtype)
    for j in range(channels):
        column = x[:, j].numpy()
        present = [v for t, v in enumerate(column) if valid[t]]
        lo, hi = min(present) * np.float32(factor), max(present) * np.float32(factor)
        levels = 2 ** int(widths[j]) - 1
        s = rounded((hi - lo) / np.float32(levels), dtype) if levels else np.float32(0)
        o = rounded(lo, dtype) if levels else offset[0, j].float().item()
        if not levels:
            assert abs(o - np.mean(present)) <= 1e-2 * np.abs(present).max()
        assert scale[0, j].float().item() == s
        assert offset[0, j].float().item() == o
        for t, value in enumerate(column):
            expected = 0.0
            if valid[t] and s > 0:
                expected = round(float(min(max((value - o) / s, np.float32(0)), levels)))
            assert codes[t, j] == expected, (t, j, value, s, o)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_nearest_to_the_stored_range(bits, dtype):
    """No other code is nearer to a number than its own, given scale and offset as stored.

    Codes taken against ranges before rounding fail this: that they would differ is checked too,
    for the dtypes whose rounding is coarse.
    """
    x, valid = group(200, 32, seed=bits)
    width = torch.full((32,), bits)
    codes, scale, offset = encode(x, valid, width, MinMax(), dtype)
    levels = torch.arange(2**bits).float()
    values = offset.float()[..., None] + scale.float()[..., None] * levels  # [1, D, 2**bits]
    error = (x[..., None] - values).abs()
    own = error.gather(-1, codes[..., None].long()).squeeze(-1)
    slack = 1e-5 * x.abs() + 1e-6
    assert (own <= error.amin(-1) + slack).all()

    unrounded, _, _ = encode(x, valid, width, MinMax(), torch.float32)
    if dtype != torch.float32 and bits >= 4:
        assert not torch.equal(unrounded, codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_constant_channels(bits, dtype, factor):
    """A channel without extent has scale 0 and comes back as its (scaled) value."""
    value = torch.tensor([3.0, -7.25, 0.0, 1e4, -1e-3])
    x = value.expand(50, 5).clone()
    valid = torch.ones(50, 1, dtype=torch.bool)
    codes, scale, offset = encode(x, valid, torch.full((5,), bits), MinMax(factor), dtype)
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(offset[0], (value * factor).to(dtype))


@pytest.mark.parametrize("estimator", [make() for make in RANGE_ESTIMATORS.values()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token(estimator, dtype):
    x, valid = group(16, 8, seed=1, absent=15)
    codes, scale, offset = encode(x, valid, torch.full((8,), 2), estimator, dtype)
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(offset[0], x[valid[:, 0]][0].to(dtype))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_huge_offsets(bits, dtype):
    """Keys of Qwen2-VL have channels far from 0, where the offset itself is rounded coarsely."""
    generator = torch.Generator().manual_seed(0)
    center = torch.tensor([300.0, -5000.0, 20000.0, 0.0])
    x = center + torch.randn(224, 4, generator=generator)
    valid = torch.ones(224, 1, dtype=torch.bool)
    codes, scale, offset = encode(x, valid, torch.full((4,), bits), MinMax(), dtype)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(offset).all()
    assert (codes <= 2**bits - 1).all()
    back = offset.float() + scale.float() * codes
    # Half a step, and what rounding the offset moves.
    bound = scale.float() / 2 + (center.abs() + 5) * torch.finfo(dtype).eps * 1.01
    assert ((back - x).abs() <= bound + 1e-5).all()


def test_an_extent_that_rounds_to_zero():
    """Scales below the smallest number of the dtype are a constant channel, never a NaN."""
    x = torch.tensor([[1e-9], [2e-9], [3e-9]])
    valid = torch.ones(3, 1, dtype=torch.bool)
    codes, scale, _ = encode(x, valid, torch.tensor([4]), MinMax(), torch.float16)
    assert not scale.any()
    assert not codes.any()


def test_numbers_outside_the_range_are_clamped():
    x = torch.tensor([[-4.0], [-1.0], [1.0], [4.0]])
    valid = torch.ones(4, 1, dtype=torch.bool)
    codes, scale, offset = encode(x, valid, torch.tensor([2]), MinMax(0.25), torch.float32)
    assert offset.item() == -1
    assert scale.item() == pytest.approx(2 / 3)
    assert codes.flatten().tolist() == [0, 0, 3, 3]


def test_components_without_bits_keep_their_mean_only():
    x, valid = group(30, 4, seed=2)
    codes, scale, offset = encode(x, valid, torch.tensor([0, 1, 0, 4]), MinMax(), torch.float32)
    assert not codes[:, [0, 2]].any()
    assert not scale[0, [0, 2]].any()
    assert codes[:, [1, 3]].any()
    assert torch.equal(offset[0, [1, 3]], x.amin(0)[[1, 3]])
    torch.testing.assert_close(offset[0, [0, 2]], x.mean(0)[[0, 2]])


def test_factors_of_components():
    x, valid = group(30, 4, seed=3)
    factors = torch.tensor([0.3, 0.6, 0.9, 1.0])
    many = encode(x, valid, torch.full((4,), 2), MinMax(factors), torch.float32)
    for j, factor in enumerate(factors.tolist()):
        one = encode(x, valid, torch.full((4,), 2), MinMax(factor), torch.float32)
        for a, b in zip(many, one, strict=True):
            torch.testing.assert_close(a[:, j], b[:, j])
