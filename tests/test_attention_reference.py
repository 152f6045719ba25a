"""The CPU reference against attention that dequantises first, in float64 and in loops."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_calibquant.attention.reference import (
    LEAST_EXTENT,
    Calibration,
    VisualPages,
    calibrate,
    mixed_attention,
)
from vllm_calibquant.attention.store import Codec, store_visual, visual_mask
from vllm_calibquant.config import CalibQuantConfig
from vllm_calibquant.format import PageFormat
from vllm_calibquant.quantize import encode

D = 32
TOLERANCE = 2e-5


def poisoned_pages(
    fmt: PageFormat, used: torch.Tensor, heads: int, generator: torch.Generator
) -> torch.Tensor:
    """uint8 ``[P, Hkv, head_bytes]`` with random codes where ``used`` and bytes 0xFF elsewhere."""
    count = len(used)
    parts = []
    for bits in (fmt.key_bits, fmt.value_bits):
        top = (1 << torch.tensor(bits)) - 1
        codes = torch.randint(0, 256, (count, heads, fmt.tokens, D), generator=generator) % (
            top + 1
        )
        parts.append(torch.where(used[:, None, :, None], codes, top).to(torch.uint8))
    ranges = torch.randn(count, heads, 4, D, generator=generator)
    ranges[..., (0, 2), :] = ranges[..., (0, 2), :].abs()  # scales
    pages = fmt.pack(*parts, ranges.to(fmt.dtype))
    pages[..., fmt.key_code_bytes + fmt.value_code_bytes : fmt.range_offset] = 0xFF
    return pages


def calibrated(scores: list[float], calibration: Calibration | None) -> list[float]:
    """Eq. 8 for the visual scores of one query, slope held at 0."""
    if calibration is None or not scores:
        return scores
    low, high = min(scores), max(scores)
    new_low = low - calibration.tau_min
    if high == low:
        return [new_low] * len(scores)
    slope = max((high - calibration.tau_max - new_low) / (high - low), 0.0)
    return [new_low + slope * (x - low) for x in scores]


def plain_attention(query, key, value, visual, fmt, scale, calibration):
    """Dequantise every visual token, then softmax: float64, one query and head at a time."""
    num_tokens, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    cached = len(key) - num_tokens
    visual_k, visual_v = [], []
    if visual is not None:
        key_codes, value_codes, ranges = fmt.unpack(visual.pages)
        s_k, o_k, s_v, o_v = ranges.double().unbind(-2)
        for page, token in visual.used.nonzero().tolist():
            visual_k.append(o_k[page] + s_k[page] * key_codes[page, :, token].double())
            visual_v.append(o_v[page] + s_v[page] * value_codes[page, :, token].double())
    out = torch.zeros(num_tokens, num_heads, D, dtype=torch.float64)
    for t in range(num_tokens):
        for h in range(num_heads):
            q = query[t, h].double()
            seen = range(cached + t + 1)
            exact = [scale * (q @ key[i, h // group].double()).item() for i in seen]
            coded = [scale * (q @ k[h // group]).item() for k in visual_k]
            weights = torch.tensor(exact + calibrated(coded, calibration)).double().softmax(0)
            values = [value[i, h // group].double() for i in seen]
            values += [v[h // group] for v in visual_v]
            out[t, h] = weights @ torch.stack(values)
    return out


FORMATS = [
    PageFormat.uniform(D, 1),
    PageFormat.uniform(D, 2, torch.float32),
    PageFormat.uniform(D, 4, torch.float16),
    PageFormat(D, (4,) * 8 + (1,) * 24, (0, 2) * 16),
]


def check(fmt, heads, tokens, cached, used, calibration, seed=0):
    """Compare the reference with plain attention on random inputs."""
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, num_heads, D, generator=generator)
    key = torch.randn(cached + tokens, num_kv_heads, D, generator=generator)
    value = torch.randn(cached + tokens, num_kv_heads, D, generator=generator)
    visual = None
    if used is not None:
        visual = VisualPages(poisoned_pages(fmt, used, num_kv_heads, generator), used)
    scale = D**-0.5
    out = mixed_attention(
        query,
        key,
        value,
        visual,
        page_format=fmt,
        scale=scale,
        calibration=calibration,
    )
    assert out.dtype == torch.float32
    expected = plain_attention(query, key, value, visual, fmt, scale, calibration)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def slots_used(fmt: PageFormat, *ranges: tuple[int, int]) -> torch.Tensor:
    """Mark, in ``[P, tokens]``, sub-slots from first to last (exclusive) of each page."""
    used = torch.zeros(len(ranges), fmt.tokens, dtype=torch.bool)
    for page, (first, last) in enumerate(ranges):
        used[page, first * 16 : last * 16] = True
    return used


@pytest.mark.parametrize("calibration", [None, Calibration(0.0, 3.0), Calibration(0.5, 0.25)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=["GQA", "MHA", "MQA"])
@pytest.mark.parametrize("fmt", FORMATS, ids=["1", "2", "4", "mixed"])
def test_decode(fmt, heads, calibration):
    """Cached text, a page that is not full, and a page whose first slot is another request's."""
    check(fmt, heads, 1, 19, slots_used(fmt, (0, fmt.slots - 1), (1, fmt.slots)), calibration)


@settings(max_examples=40, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    heads=st.sampled_from([(2, 1), (2, 2), (6, 2)]),
    tokens=st.integers(1, 9),
    cached=st.integers(0, 20),
    pages=st.integers(0, 3),
    calibration=st.sampled_from([None, Calibration(0.0, 3.0), Calibration(2.0, 0.0)]),
    seed=st.integers(0, 999),
)
@example(FORMATS[0], (2, 1), 1, 0, 3, Calibration(0.0, 3.0), 0)  # no text in the cache
@example(FORMATS[0], (2, 1), 9, 0, 0, Calibration(0.0, 3.0), 0)  # nothing in the cache
def test_any_shape(fmt, heads, tokens, cached, pages, calibration, seed):
    used = None
    if pages:
        generator = torch.Generator().manual_seed(seed)
        slots = torch.rand(pages, fmt.slots, generator=generator) < 0.4
        slots[0, 0] = True  # the metadata lists no request without visual tokens here
        used = slots.repeat_interleave(16, 1)
    check(fmt, heads, tokens, cached, used, calibration, seed)


def test_many_queries():
    fmt = FORMATS[0]
    check(fmt, (4, 2), 70, 33, slots_used(fmt, (0, 14), (0, 3)), Calibration(0.0, 3.0))


def test_queries_do_not_see_later_tokens():
    generator = torch.Generator().manual_seed(0)
    fmt = FORMATS[0]
    query = torch.randn(6, 4, D, generator=generator)
    key, value = torch.randn(2, 10, 2, D, generator=generator)
    used = slots_used(fmt, (0, 2))
    visual = VisualPages(poisoned_pages(fmt, used, 2, generator), used)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return mixed_attention(
            query, k, v, visual, page_format=fmt, scale=1.0, calibration=Calibration(0.0, 3.0)
        )

    before = attend(key, value)
    changed_k, changed_v = key.clone(), value.clone()
    changed_k[-1], changed_v[-1] = 99.0, -99.0
    after = attend(changed_k, changed_v)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.allclose(before[-1], after[-1])


def test_slots_of_other_requests_change_nothing():
    """Whatever an unused sub-slot holds, outputs and calibration are the same, bit for bit."""
    fmt = FORMATS[1]
    used = slots_used(fmt, (1, 3), (0, 1))
    outputs = []
    for poison in (0x00, 0xFF, 0xA5):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(2, 4, D, generator=generator)
        key, value = torch.randn(2, 7, 2, D, generator=generator)
        k, v, ranges = fmt.unpack(poisoned_pages(fmt, used, 2, generator))
        k = torch.where(used[:, None, :, None], k, poison & 3).to(torch.uint8)
        v = torch.where(used[:, None, :, None], v, poison & 3).to(torch.uint8)
        visual = VisualPages(fmt.pack(k, v, ranges), used)
        outputs.append(
            mixed_attention(
                query,
                key,
                value,
                visual,
                page_format=fmt,
                scale=1.0,
                calibration=Calibration(0.0, 3.0),
            )
        )
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


# Calibration.

scores = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20).filter(
    lambda values: not 0 < max(values) - min(values) <= LEAST_EXTENT
)
taus = st.builds(Calibration, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 1.0, 3.0]))


@settings(max_examples=200, deadline=None)
@given(values=scores, tau=taus)
def test_calibration_moves_the_ends_and_keeps_the_order(values, tau):
    x = torch.tensor(values)
    y = calibrate(x, torch.ones_like(x, dtype=torch.bool), tau)
    torch.testing.assert_close(y, torch.tensor(calibrated(values, tau)), rtol=1e-5, atol=2e-5)
    order = x.argsort()
    assert (y[order].diff() >= -2e-5).all(), "calibration reversed an order"
    low, high = x.min(), x.max()
    torch.testing.assert_close(y[x == low][0], low - tau.tau_min)
    if high - low > tau.tau_max - tau.tau_min and high > low:
        torch.testing.assert_close(y[x == high][0], high - tau.tau_max, atol=1e-4, rtol=1e-4)


def test_scores_too_close_for_a_slope_are_equal():
    x = torch.tensor([0.0, 1e-45])
    assert calibrate(x, torch.ones_like(x, dtype=torch.bool), Calibration(0.5, 0.0)).tolist() == [
        -0.5,
        -0.5,
    ]


def test_slope_is_held_at_zero():
    """Scores closer together than the shifts differ would be reversed; they become equal."""
    x = torch.tensor([[1.0, 2.0, 3.5], [1.0, 2.0, 4.5]])
    y = calibrate(x, torch.ones_like(x, dtype=torch.bool), Calibration(0.0, 3.0))
    assert y[0].tolist() == [1.0, 1.0, 1.0]
    assert y[1].tolist() == pytest.approx([1.0, 1.0 + 0.5 / 3.5, 1.5])


def test_equal_scores_and_a_single_score():
    for x in (torch.tensor([2.0, 2.0, 2.0]), torch.tensor([2.0])):
        used = torch.ones_like(x, dtype=torch.bool)
        y = calibrate(x, used, Calibration(0.5, 3.0))
        assert y.tolist() == [1.5] * len(x)


def test_calibration_looks_at_used_scores_only():
    x = torch.tensor([1.0, 900.0, 5.0, -900.0, 3.0])
    used = torch.tensor([True, False, True, False, True])
    y = calibrate(x, used, Calibration(0.0, 1.0))
    assert y[used].tolist() == pytest.approx([1.0, 4.0, 2.5])


def test_calibration_off_is_not_calibration_by_zero_shifts_of_something_else():
    """No calibration and shifts of 0 agree; other shifts do not."""
    fmt = FORMATS[0]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, D, generator=generator)
    key, value = torch.randn(2, 5, 2, D, generator=generator)
    used = slots_used(fmt, (0, 14))
    visual = VisualPages(poisoned_pages(fmt, used, 2, generator), used)
    out = [
        mixed_attention(query, key, value, visual, page_format=fmt, scale=1.0, calibration=tau)
        for tau in (None, Calibration(0.0, 0.0), Calibration(0.0, 3.0))
    ]
    torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-5)
    assert (out[0] - out[2]).abs().max() > 1e-2


# Storing.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_store_writes_its_pages_and_no_others(bits, dtype):
    """Tokens of two requests in any order; ranges come from the tokens of each page alone."""
    config = CalibQuantConfig(bits=bits)
    codec = Codec.of(config, 2, D, dtype)
    fmt = codec.page_format
    generator = torch.Generator().manual_seed(bits)
    filled = {3: fmt.slots, 7: 2, 1: fmt.slots - 1}  # page: sub-slots
    slots = torch.cat(
        [
            (page + ((1 + slot) << 23)) * 16 + torch.arange(16)
            for page, count in filled.items()
            for slot in range(count)
        ]
    )
    slots = slots[torch.randperm(len(slots), generator=generator)]
    key = torch.randn(len(slots), 2, D, generator=generator).mul(3).add(20).to(dtype)
    value = torch.randn(len(slots), 2, D, generator=generator).to(dtype)
    pool = torch.full((9, 2, fmt.head_bytes), 0xFF, dtype=torch.uint8)
    store_visual(key, value, pool, slots, codec)

    for page in range(9):
        if page not in filled:
            assert (pool[page] == 0xFF).all(), f"page {page} was touched"
            continue
        mine = slots // 16 % 2**23 == page
        token = (slots // 16 // 2**23 - 1) * 16 + slots % 16
        order = token[mine].argsort()
        assert torch.equal(token[mine][order], torch.arange(16 * filled[page]))
        for head in range(2):
            parts = []
            for x, widths, estimator in (
                (key, fmt.key_bits, codec.key_estimator),
                (value, fmt.value_bits, codec.value_estimator),
            ):
                tokens = x[mine][order][:, head].float()
                valid = torch.ones(len(tokens), 1, dtype=torch.bool)
                parts.append(encode(tokens, valid, torch.tensor(widths), estimator, dtype))
            (k, *k_range), (v, *v_range) = parts
            expected = fmt.pack(k, v, torch.cat([*k_range, *v_range]))
            assert torch.equal(pool[page, head], expected)


def test_visual_slots_are_told_from_text_and_padding():
    slots = torch.tensor(
        [-1, 0, 5 * 16 + 3, (2**23 - 1) * 16 + 15, 2**23 * 16, (5 + 2 * 2**23) * 16]
    )
    assert visual_mask(slots, 16).tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.6), (4, 0.12)])
def test_keys_with_large_offsets_survive(bits, bound):
    """Channels far from 0 (Qwen2-VL) cost nothing: offsets are exact up to rounding."""
    generator = torch.Generator().manual_seed(0)
    codec = Codec.of(CalibQuantConfig(bits=bits, calibration=False), 1, D, torch.float32)
    fmt = codec.page_format
    tokens = fmt.tokens
    key = torch.randn(tokens, 1, D, generator=generator)
    key += 100 * torch.randn(D, generator=generator).sign()
    value = torch.randn(tokens, 1, D, generator=generator)
    query = torch.randn(1, 4, D, generator=generator)
    own = torch.randn(1, 1, D, generator=generator)
    pool = torch.zeros(2, 1, fmt.head_bytes, dtype=torch.uint8)
    positions = torch.arange(tokens)
    store_visual(key, value, pool, (1 + ((1 + positions // 16) << 23)) * 16 + positions % 16, codec)
    visual = VisualPages(pool[1:], torch.ones(1, tokens, dtype=torch.bool))
    out = mixed_attention(
        query,
        own,
        own,
        visual,
        page_format=fmt,
        scale=1 / math.sqrt(D),
        calibration=None,
    )
    exact = mixed_attention(
        query,
        torch.cat([key, own]),
        torch.cat([value, own]),
        None,
        page_format=fmt,
        scale=1 / math.sqrt(D),
        calibration=None,
    )
    assert (out - exact).abs().max() < bound * exact.abs().max()
