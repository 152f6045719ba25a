"""store against naive_store."""

import random

import pytest
import torch

from csrc_triton import DeviceFormat, allocate_tables, build_tables, store
from csrc_triton.metadata import naive_tables
from csrc_triton.store import naive_store, quantise
from tests.kernels.cases import Pool, make_format, make_format_on
from vllm_calibquant.format import PageFormat
from vllm_calibquant.tags import tag

FORMATS = {
    "1 bit, 64": dict(head_size=64),
    "1 bit, 128": dict(head_size=128),
    "2 bit, 64, fp16": dict(head_size=64, bits=2, dtype=torch.float16),
    "4 bit, 128": dict(head_size=128, bits=4),
    "1 bit, 80": dict(head_size=80),
    "per component": dict(head_size=64, bits=((4, 3, 3, 2) * 16, (2, 1, 1, 0) * 16)),
}


def run(fmt, slots, *, quantile=None, heads=2, device="cpu", kernel="auto", seed=0):
    pool = Pool(fmt, heads, 12, seed=seed)
    d = fmt.page.head_size
    mapping = torch.tensor(slots, dtype=torch.int64)
    wide = pool.numbers(len(slots), heads, 2 * d + 8)  # K and V are strided views of a QKV tensor
    key, value = wide[..., :d], wide[..., d : 2 * d]
    key[:, 0, 5] = 1.25  # a constant channel
    tables = allocate_tables(max_num_reqs=1, max_num_blocks=1, max_num_tokens=len(slots),
                             slots=fmt.page.slots, num_kv_heads=heads, device=device)  # fmt: skip
    one = torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    row = torch.zeros(1, 1, dtype=torch.int32)
    step = [x.to(device) for x in (row, one, starts, mapping)]
    build_tables(tables, *step, num_decodes=0)
    want = pool.cache.clone()
    naive_store(naive_tables(row, one, starts, mapping)["pages"], fmt, key, value, want, mapping,
                quantile=quantile)  # fmt: skip
    cache = pool.cache.to(device)
    wide = wide.to(device)
    store(tables, make_format_on(fmt, device), wide[..., :d], wide[..., d : 2 * d], cache, step[3],
          quantile=quantile, kernel=kernel)  # fmt: skip
    return cache.cpu(), want


def ragged_slots(fmt, seed):
    """Text runs that begin and end in mid-block between pages of random length, and padding."""
    rng = random.Random(seed)
    pages = list(range(12))
    rng.shuffle(pages)
    slots = []
    for _ in range(4):
        count = rng.randint(1, fmt.page.slots)
        visual = pages.pop()
        slots += [tag(visual, s) * 16 + i for s in range(count) for i in range(16)]
        text = pages.pop() * 16 + rng.randint(0, 12)
        slots += list(range(text, text + rng.randint(1, 16 - text % 16)))
        slots += [-1] * rng.randint(0, 2)
    return slots


def differing_bits(a, b):
    x = a.contiguous().view(torch.uint8) ^ b.contiguous().view(torch.uint8)
    return sum(((x >> i) & 1).sum().item() for i in range(8))


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    fmt = make_format(**FORMATS[name])
    n = fmt.page.slots
    slots = [2 * 16 + i for i in range(9, 16)]
    slots += [tag(5, s) * 16 + i for s in range(n) for i in range(16)]
    slots += [tag(6, s) * 16 + i for s in range(min(2, n)) for i in range(16)]
    slots += [3 * 16 + i for i in range(3)] + [-1, -1]
    got, want = run(fmt, slots)
    assert differing_bits(got, want) == 0


@pytest.mark.parametrize("clip", [0.6, (0.2, 1.0) * 32])
def test_ranges_shrunk_around_their_middle(clip):
    page = PageFormat.uniform(64, 2)
    a, b = shrunk(clip)
    fmt = DeviceFormat(page, "cpu", a, a, b, b)
    got, want = run(fmt, ragged_slots(fmt, 1), heads=1)
    assert differing_bits(got, want) == 0
    x = torch.randn(40, 64) + 5
    _, scale, offset = quantise(x, page.key_bits, fmt.key_clips, torch.float32, None, fmt.key_mixes)
    middle = (x.amin(0) + x.amax(0)) / 2
    assert torch.allclose(offset + 1.5 * scale, middle, atol=1e-5)
    assert torch.allclose(3 * scale, torch.tensor(clip) * (x.amax(0) - x.amin(0)), atol=1e-5)


def shrunk(clip):
    """Weights of a range shrunk by ``clip`` around its middle."""
    clip = torch.as_tensor(clip)
    pair = ((1 + clip) / 2).tolist(), ((1 - clip) / 2).tolist()
    return tuple(tuple(x) if isinstance(x, list) else x for x in pair)


def test_gaps_and_odd_page():
    fmt = make_format(64)
    slots = [tag(4, 0) * 16 + i for i in range(16)] + [1 * 16 + i for i in range(16)]
    slots += [tag(4, s) * 16 + i for s in range(1, 5) for i in range(16)]
    got, want = run(fmt, slots)
    assert differing_bits(got, want) == 0


def test_scrub_keeps_what_the_step_writes():
    fmt = make_format(64)
    slots = [7 * 16, 7 * 16 + 1, 8 * 16, 9 * 16 + 4, -1, *(10 * 16 + i for i in range(16)), 11 * 16]
    got, want = run(fmt, slots)
    assert differing_bits(got, want) == 0
    assert got[7, :, 2:].abs().sum() == 0 and got[8, :, 1:].abs().sum() == 0
    assert got[9, :, 5:].isnan().all()  # first slot not written: not ours to scrub


@pytest.mark.parametrize("quantile", [0.02, 0.25])
def test_quantile(quantile):
    fmt = make_format(64, 2)
    slots = [tag(5, s) * 16 + i for s in range(3) for i in range(16)]
    got, want = run(fmt, slots, quantile=quantile, heads=1)
    # Interpolation in another order may round a range to the neighbouring 16-bit number.
    assert differing_bits(got, want) <= 40


def test_single_tokens_only():
    fmt = make_format(128)
    got, want = run(fmt, [3 * 16 + 2])
    assert differing_bits(got, want) == 0


def test_refuses_another_dtype():
    fmt = make_format(64)
    tables = allocate_tables(max_num_reqs=1, max_num_blocks=1, max_num_tokens=32, slots=14,
                             num_kv_heads=1, device="cpu")  # fmt: skip
    x = torch.zeros(1, 1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="cache"):
        store(tables, fmt, x, x, Pool(fmt, 1, 1).cache, torch.zeros(1, dtype=torch.int64))
