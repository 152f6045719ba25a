"""Page format: packing is the inverse of unpacking, and every bit lies where the docstring says.

The second half reads single bits with a reader of its own, written in loops from the tables in
``vllm_calibquant/format.py``; it shares no helper with the code under test.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_calibquant.format import PageFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_SIZES = range(32, 257, 8)


def random_codes(bits: tuple[int, ...], tokens: int, seed: int) -> torch.Tensor:
    """uint8 ``[tokens, D]`` with component j below ``2 ** bits[j]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (tokens, len(bits)), generator=generator)
    return (x % (1 << torch.tensor(bits))).to(torch.uint8)


def random_page(fmt: PageFormat, tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """K codes, V codes and ranges of a page with so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.randn(4, fmt.head_size, generator=generator).to(fmt.dtype)
    return (
        random_codes(fmt.key_bits, tokens, seed + 1),
        random_codes(fmt.value_bits, tokens, seed + 2),
        ranges,
    )


def check_round_trip(fmt: PageFormat, tokens: int, seed: int = 0) -> None:
    key, value, ranges = random_page(fmt, tokens, seed)
    page = fmt.pack(key, value, ranges)
    assert page.dtype == torch.uint8
    assert page.shape == (fmt.head_bytes,)
    k, v, r = fmt.unpack(page)
    assert torch.equal(k[:tokens], key)
    assert torch.equal(v[:tokens], value)
    assert torch.equal(r, ranges)
    assert not k[tokens:].any()
    assert not v[tokens:].any()


@st.composite
def formats(draw: st.DrawFn) -> PageFormat:
    """A format with widths of its own for each component of K and of V, 0 bits included."""
    head_size = 8 * draw(st.integers(1, 32))
    palettes = st.sampled_from(
        [(1,), (2,), (4,), (0, 1), (0, 2), (1, 2), (0, 1, 2, 4), (0, 0, 0, 8), (3, 5)]
    )
    parts = []
    for palette in (draw(palettes), draw(palettes)):
        # A seed instead of a list of widths: lists of 256 draws shrink slowly and find no more.
        generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
        index = torch.randint(len(palette), (head_size,), generator=generator)
        index[0] = len(palette) - 1  # a part without any plane is refused
        parts.append(tuple(palette[i] for i in index.tolist()))
    key_bits, value_bits = parts
    return PageFormat(head_size, key_bits, value_bits, draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_round_trip_of_every_head_size(bits):
    for head_size in HEAD_SIZES:
        fmt = PageFormat.uniform(head_size, bits, DTYPES[head_size // 8 % 3])
        for tokens in {1, 15, 16, 17, fmt.tokens - 1, fmt.tokens}:
            check_round_trip(fmt, tokens, seed=head_size)


@pytest.mark.parametrize(
    ("head_size", "bits", "dtype"),
    [
        (64, 1, torch.bfloat16),
        (80, 1, torch.float32),
        (128, 2, torch.float16),
        (96, 4, torch.bfloat16),
    ],
)
def test_round_trip_of_every_token_count(head_size, bits, dtype):
    fmt = PageFormat.uniform(head_size, bits, dtype)
    for tokens in range(1, fmt.tokens + 1):
        check_round_trip(fmt, tokens, seed=tokens)


@settings(max_examples=100, deadline=None)
@given(fmt=formats(), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_round_trip_of_mixed_widths(fmt, share, seed):
    check_round_trip(fmt, 1 + int(share * (fmt.tokens - 1)), seed)


def test_pages_of_several_heads_are_packed_one_by_one():
    fmt = PageFormat.uniform(64, 2)
    parts = [random_page(fmt, 50, seed) for seed in range(6)]
    key, value, ranges = (
        torch.stack(part).unflatten(0, (2, 3)) for part in zip(*parts, strict=True)
    )
    pages = fmt.pack(key, value, ranges)
    assert pages.shape == (2, 3, fmt.head_bytes)
    for i, part in enumerate(parts):
        assert torch.equal(pages[i // 3, i % 3], fmt.pack(*part))
    k, v, r = fmt.unpack(pages)
    assert torch.equal(k[:, :, :50], key)
    assert torch.equal(v[:, :, :50], value)
    assert torch.equal(r, ranges)


# Byte map, read bit by bit.


class BitReader:
    """Reads a page with nothing but the tables of ``format.py``'s docstring."""

    def __init__(self, fmt: PageFormat, page: torch.Tensor) -> None:
        self.page = page.tolist()
        self.head_size = fmt.head_size
        self.itemsize = torch.empty(0, dtype=fmt.dtype).element_size()
        self.planes = {
            "K": self.plane_list(fmt.key_bits),
            "V": self.plane_list(fmt.value_bits),
        }
        count = len(self.planes["K"]) + len(self.planes["V"])
        self.slots = min(448 * self.head_size // count // 16, 14)
        if len(self.planes["K"]) % 64 or len(self.planes["V"]) % 64:
            self.slots -= self.slots % 2

    @staticmethod
    def plane_list(bits):
        """(component, bit) of each plane: by bit, then by component, padded to 32."""
        planes = []
        for bit in range(8):
            for component, width in enumerate(bits):
                if bit < width:
                    planes.append((component, bit))
        while len(planes) % 32:
            planes.append(None)
        return planes

    def code_bit(self, part: str, token: int, plane: int) -> int:
        """One code bit."""
        planes = len(self.planes[part])
        start = 0 if part == "K" else self.slots * 2 * len(self.planes["K"])
        size = 1 << planes.bit_length() - 1
        while plane >= size:  # a section before
            start += self.slots * 2 * size
            planes, plane = planes - size, plane - size
            size = 1 << planes.bit_length() - 1
        tile_slots = {32: 4, 64: 4, 128: 2}.get(size, 1)
        begin = token // (16 * tile_slots) * tile_slots
        while begin + tile_slots > self.slots:  # the end of a page goes in tiles of 2 and 1
            tile_slots //= 2
            begin = token // (16 * tile_slots) * tile_slots
        start += begin * 2 * size  # a sub-slot has 16 tokens, so 2 bytes a plane
        words_of_lane = tile_slots * 2 * size // 4 // 32
        token_group = (token - begin * 16) // 8
        pair = token_group * (size // 8) + plane // 8
        if part == "K":
            lane, half = 4 * (token % 8) + plane % 8 // 2, plane % 2
        else:
            lane, half = 4 * (plane % 8) + token % 8 // 2, token % 2
        at = start + 4 * (lane * words_of_lane + pair // 16)
        word = int.from_bytes(bytes(self.page[at : at + 4]), "little")
        return word >> (16 * half + pair % 16) & 1

    def code(self, part: str, token: int, component: int) -> int:
        """Integer code of a component, put together from its planes."""
        return sum(
            self.code_bit(part, token, plane) << entry[1]
            for plane, entry in enumerate(self.planes[part])
            if entry is not None and entry[0] == component
        )

    def range_bytes(self, index: int) -> bytes:
        """Raw bytes of K scale, K offset, V scale or V offset."""
        size = self.head_size * self.itemsize
        start = len(self.page) - (4 - index) * size
        return bytes(self.page[start : start + size])


def raw(x: torch.Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).tolist())


@settings(max_examples=60, deadline=None)
@given(fmt=formats(), seed=st.integers(0, 999), data=st.data())
@example(fmt=PageFormat.uniform(128, 1), seed=0, data=None)
@example(fmt=PageFormat.uniform(128, 2, torch.float32), seed=0, data=None)
@example(fmt=PageFormat.uniform(72, 1, torch.float16), seed=0, data=None)
def test_every_bit_lies_where_the_docstring_says(fmt, seed, data):
    key, value, ranges = random_page(fmt, fmt.tokens, seed)
    reader = BitReader(fmt, fmt.pack(key, value, ranges))
    assert reader.slots == fmt.slots
    for i in range(4):
        assert reader.range_bytes(i) == raw(ranges[i])
    tokens, components = st.integers(0, fmt.tokens - 1), st.integers(0, fmt.head_size - 1)
    for i in range(20):
        token = data.draw(tokens) if data else i * 37 % fmt.tokens
        component = data.draw(components) if data else i * 53 % fmt.head_size
        assert reader.code("K", token, component) == key[token, component]
        assert reader.code("V", token, component) == value[token, component]


@pytest.mark.parametrize(
    "fmt",
    [
        PageFormat.uniform(32, 1),  # 32 planes: half a word for each lane and sub-slot
        PageFormat.uniform(64, 1, torch.float32),  # tiles of 4 sub-slots, the last of 2
        PageFormat(48, (1,) * 48, (2, 0, 1) * 16),  # P_K = 64, P_V = 64, mixed widths
        PageFormat(64, (4,) * 64, (1,) * 64),  # P_K = 256, P_V = 64
    ],
    ids=["D32", "D64-float32", "mixed", "K4V1"],
)
def test_whole_pages_bit_by_bit(fmt):
    key, value, ranges = random_page(fmt, fmt.tokens)
    reader = BitReader(fmt, fmt.pack(key, value, ranges))
    for part, codes in (("K", key), ("V", value)):
        expected = codes.tolist()
        for plane, entry in enumerate(reader.planes[part]):
            for token in range(fmt.tokens):
                bit = 0 if entry is None else expected[token][entry[0]] >> entry[1] & 1
                assert reader.code_bit(part, token, plane) == bit, (part, token, plane)


@settings(max_examples=100, deadline=None)
@given(fmt=formats())
def test_parts_of_a_page_do_not_overlap(fmt):
    k, v, r = fmt.key_code_bytes, fmt.value_code_bytes, 4 * fmt.head_size * fmt.dtype.itemsize
    assert fmt.head_bytes == 16 * 2 * fmt.head_size * fmt.dtype.itemsize
    assert fmt.value_code_offset == k
    assert k + v <= fmt.range_offset == fmt.head_bytes - r
    # Kernels load whole words.
    assert k % 4 == 0
    assert v % 4 == 0
    # What lies between codes and ranges stays 0, so that equal inputs give equal pages.
    page = fmt.pack(*random_page(fmt, fmt.tokens))
    assert not page[k + v : fmt.range_offset].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_capacity(dtype):
    tokens = {
        (head_size, bits): PageFormat.uniform(head_size, bits, dtype).tokens
        for head_size in (32, 64, 80, 96, 128, 256)
        for bits in (1, 2, 4)
    }
    assert {b: tokens[128, b] for b in (1, 2, 4)} == {1: 224, 2: 112, 4: 48}
    assert {b: tokens[64, b] for b in (1, 2, 4)} == {1: 224, 2: 112, 4: 48}
    assert {b: tokens[256, b] for b in (1, 2, 4)} == {1: 224, 2: 112, 4: 48}
    assert {b: tokens[32, b] for b in (1, 2, 4)} == {1: 224, 2: 112, 4: 48}
    # 96 = 3 * 32: an odd number of words for each lane forbids an odd number of sub-slots only at
    # 1 bit, where 14 is even anyway.
    assert {b: tokens[96, b] for b in (1, 2, 4)} == {1: 224, 2: 112, 4: 48}
    # 80 channels are padded to 96 planes at 1 bit.
    assert {b: tokens[80, b] for b in (1, 2, 4)} == {1: 160, 2: 96, 4: 48}


def test_density_against_the_models_precision():
    fmt = PageFormat.uniform(128, 1)
    assert fmt.slots == 14
    assert fmt.bytes_per_token == pytest.approx(8192 / 224)
    assert 2 * 128 * 2 / fmt.bytes_per_token == 14


def test_more_tokens_for_fewer_planes():
    """P_K and P_V count together, up to the sub-slots that an id can name."""
    half = PageFormat(128, (1,) * 128, (0, 1) * 64)
    assert (half.key_planes, half.value_planes) == (128, 64)
    assert half.tokens == 224  # 298 tokens fit, 14 sub-slots have tags
    assert PageFormat(128, (2,) * 128, (1,) * 128).tokens == 144  # 149 fit
    assert PageFormat(128, (4,) * 128, (1,) * 128).tokens == 80  # 89 fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((60, (1,) * 60, (1,) * 60), "head size 60 is not a multiple of 8"),
        ((0, (), ()), "head size 0 is not a multiple of 8"),
        ((64, (1,) * 63, (1,) * 64), "key_bits has 63 entries for head size 64"),
        ((64, (1,) * 64, (9,) * 64), r"value_bits must lie in 0\.\.8"),
        ((64, (0,) * 64, (1,) * 64), "key_bits are all 0"),
        ((64, (1,) * 64, (0,) * 64), "value_bits are all 0"),
        ((64, (1,) * 64, (-1,) * 64), r"value_bits must lie in 0\.\.8"),
        ((64, (1,) * 64, (1,) * 64, torch.bfloat16, 32), "block size must be 16"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageFormat(*arguments)


def test_a_page_does_not_take_more_tokens_than_it_holds():
    fmt = PageFormat.uniform(64, 4)
    with pytest.raises(ValueError, match="49 tokens in a page of 48"):
        fmt.pack(*random_page(fmt, 49))
