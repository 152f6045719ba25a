"""The bytes of a visual page: the one definition that every other module uses.

A KV pool page of one layer holds ``block_size`` tokens at 16 bits, K and V, for each KV head in one
contiguous run (vLLM's layout ``LBHNC``).  A *visual page* puts the codes of many more tokens into
the same bytes.  Everything below is per (page, KV head); ``D`` is the head size and ``e`` the size
in bytes of the model's dtype:

====================  ===========================  =========================================
offset                bytes                        content
====================  ===========================  =========================================
0                     slots * 2 * P_K              K codes, bit planes
key_code_bytes        slots * 2 * P_V              V codes, bit planes
...                   unused                       what rounding to whole sub-slots leaves
head_bytes - 4De      D * e                        K scale of each channel
head_bytes - 3De      D * e                        K offset
head_bytes - 2De      D * e                        V scale
head_bytes - De       D * e                        V offset
====================  ===========================  =========================================

With a 16-bit model ``head_bytes = 64 D``; 8 D of them are ranges, so 448 D bits remain and a page
holds ``448 D / (P_K + P_V)`` tokens, rounded down to whole *sub-slots* of ``block_size`` tokens.

**Bit planes.**  A channel with ``b`` bits is ``b`` planes of weight ``s, 2s, 4s, ...``.  Planes are
ordered by bit, then by channel: plane ``p`` is bit ``p // D`` of channel ``p % D`` when all
channels have the same width (:func:`plane_map`). The number of planes is padded to a multiple of
32.

**Order of the code bits.**  Tokens go in groups of 8, planes in blocks of 8.  The planes of a part
lie in *sections*, one after the other, whose sizes are powers of two, the largest first: 192 planes
are sections of 128 and 64.  The sub-slots of a section go in *tiles* of as many as give each of 32
lanes 16 bytes, at most 4 (4, 2 or 1 for 64, 128 or 256 planes); what is left at the end of a page
goes in tiles of 2 and 1.  A page has at most 14 sub-slots, which is what block ids can name, and an
even number if there is a section of 32 planes, so that lanes have whole words.  Lane ``l`` of a
tile owns consecutive 32-bit words.  With ``nb`` plane blocks in the section, the pair
``e = token_group * nb + plane_block`` sits in word ``e // 16`` at bit ``e % 16`` of the low
half-word and of the high half-word, and stands for two code bits:

=====  =============================  ==================================  =======================
part   token within its group of 8    plane within its block of 8         low half, high half
=====  =============================  ==================================  =======================
K      ``l // 4``                     ``2 (l % 4)`` and the next          plane ``.. + 0``, ``+ 1``
V      ``2 (l % 4)`` and the next     ``l // 4``                          token ``.. + 0``, ``+ 1``
=====  =============================  ==================================  =======================

This is the register order of the A operand of ``mma.m16n8k16`` (rows are tokens for K and channels
for V), so that ``word & (0x00010001 << bit)`` *is* an operand register whose two halves are zero or
an exact power of two in bfloat16; the power folds into the query (K) or into the output (V).

The functions here are plain PyTorch and know neither vLLM nor Triton. They are what the kernels
are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

LANES = 32
GROUP = 8
"""Tokens in a token group and planes in a plane block."""

BLOCK_SIZE = 2 * GROUP
"""Tokens of a text block and of a sub-slot."""

PLANE_MULTIPLE = 32
MAX_SLOTS = 14
"""Sub-slots of a page that a tagged block id can name (:mod:`vllm_calibquant.tags`)."""


def padded_planes(planes: int) -> int:
    """Planes of a part rounded up to whole 32-bit words a lane."""
    return -(-planes // PLANE_MULTIPLE) * PLANE_MULTIPLE


@lru_cache(maxsize=64)
def plane_map(bits: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Component and bit of every plane.

    Parameters
    ----------
    bits
        Bits of each of the D components of a part.

    Returns
    -------
    component, bit : torch.Tensor
        int64 ``[padded_planes(sum(bits))]``. Planes are ordered by bit, then by component.
        Padding planes have component 0 and bit -1; their codes are always 0.
    """
    pairs = [(j, b) for b in range(max(bits, default=0)) for j, n in enumerate(bits) if n > b]
    pairs += [(0, -1)] * (padded_planes(len(pairs)) - len(pairs))
    table = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


@dataclass(frozen=True)
class PageFormat:
    """Byte map of one (visual page, KV head).

    Parameters
    ----------
    head_size
        Channels D of a head.
    key_bits, value_bits
        Bits of each of the D components of K and of V.
    dtype
        The model's dtype, which is the dtype of ranges and of text pages.
    block_size
        Tokens of a text page and of a sub-slot.
    max_slots
        Sub-slots of a page at most.  Layers share block ids, so of layers with different planes
        the one with the fewest sub-slots decides for all.

    Raises
    ------
    ValueError
        If a head size is not a multiple of 8, a component has more than 8 bits, a part has none at
        all, or not even one sub-slot fits.
    """

    head_size: int
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    max_slots: int = MAX_SLOTS

    def __post_init__(self) -> None:
        if self.head_size <= 0 or self.head_size % GROUP:
            raise ValueError(f"head size {self.head_size} is not a multiple of {GROUP}")
        if self.block_size != BLOCK_SIZE:
            raise ValueError(f"block size must be {BLOCK_SIZE}, got {self.block_size}")
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if len(bits) != self.head_size:
                raise ValueError(f"{name} has {len(bits)} entries for head size {self.head_size}")
            if not all(0 <= b <= 8 for b in bits):
                raise ValueError(f"{name} must lie in 0..8")
            if not any(bits):
                raise ValueError(f"{name} are all 0")
        if self.slots < 1:
            raise ValueError(
                f"{sum(self.key_bits)} + {sum(self.value_bits)} planes do not fit a page of head "
                f"size {self.head_size}"
            )

    @classmethod
    def uniform(cls, head_size: int, bits: int, dtype: torch.dtype = torch.bfloat16) -> PageFormat:
        """Format with the same number of bits for every channel of K and of V."""
        return cls(head_size, (bits,) * head_size, (bits,) * head_size, dtype)

    # Sizes in planes, tokens and bytes.

    @cached_property
    def key_planes(self) -> int:
        """P_K, padded to whole words a lane."""
        return padded_planes(sum(self.key_bits))

    @cached_property
    def value_planes(self) -> int:
        """P_V, padded to whole words a lane."""
        return padded_planes(sum(self.value_bits))

    @cached_property
    def slots(self) -> int:
        """Sub-slots in a page.

        Counted for 16-bit ranges whatever the dtype, so that a float32 model, whose text pages are
        twice as large, has the same layout of requests as its 16-bit twin.
        """
        planes = max(self.key_planes + self.value_planes, 1)
        slots = min(448 * self.head_size // planes // self.block_size, self.max_slots, MAX_SLOTS)
        if self.key_planes % 64 or self.value_planes % 64:
            slots -= slots % 2  # a lane's share of one sub-slot would end in half a word
        return slots

    @property
    def tokens(self) -> int:
        """Tokens that a page holds."""
        return self.slots * self.block_size

    @property
    def head_bytes(self) -> int:
        """Bytes of one (page, KV head)."""
        return self.block_size * 2 * self.head_size * self.dtype.itemsize

    @property
    def key_code_bytes(self) -> int:
        """Bytes of the K codes."""
        return self.tokens * self.key_planes // 8

    @property
    def value_code_bytes(self) -> int:
        """Bytes of the V codes."""
        return self.tokens * self.value_planes // 8

    @property
    def value_code_offset(self) -> int:
        """Byte offset of the V codes; the K codes are at 0."""
        return self.key_code_bytes

    @property
    def range_offset(self) -> int:
        """Byte offset of K scale, K offset, V scale, V offset, ``D`` numbers each."""
        return self.head_bytes - 4 * self.head_size * self.dtype.itemsize

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one visual token takes in a full page, K and V of one KV head."""
        return self.head_bytes / self.tokens

    # Whole pages.

    def pack(
        self,
        key_codes: torch.Tensor,
        value_codes: torch.Tensor,
        ranges: torch.Tensor,
    ) -> torch.Tensor:
        """Lay out pages.

        Parameters
        ----------
        key_codes, value_codes
            uint8 ``[..., n, D]`` integer codes of ``n <= tokens`` tokens; component j lies in
            ``0 .. 2**bits[j] - 1``.
        ranges
            ``[..., 4, D]`` in ``dtype``: K scale, K offset, V scale, V offset.

        Returns
        -------
        torch.Tensor
            uint8 ``[..., head_bytes]``.  Tokens past ``n`` have codes 0.
        """
        n = key_codes.shape[-2]
        if n > self.tokens:
            raise ValueError(f"{n} tokens in a page of {self.tokens}")
        out = key_codes.new_zeros((*key_codes.shape[:-2], self.head_bytes))
        k = pack_planes(self._pad(codes_to_planes(key_codes, self.key_bits)), transposed=False)
        v = pack_planes(self._pad(codes_to_planes(value_codes, self.value_bits)), transposed=True)
        out[..., : self.key_code_bytes] = k
        end = self.value_code_offset + self.value_code_bytes
        out[..., self.value_code_offset : end] = v
        out[..., self.range_offset :] = (
            ranges.to(self.dtype).contiguous().view(torch.uint8).flatten(-2)
        )
        return out

    def unpack(self, page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read pages back.

        Parameters
        ----------
        page
            uint8 ``[..., head_bytes]``.

        Returns
        -------
        key_codes, value_codes : torch.Tensor
            uint8 ``[..., tokens, D]``.
        ranges : torch.Tensor
            ``[..., 4, D]`` in ``dtype``.
        """
        end = self.value_code_offset + self.value_code_bytes
        k = unpack_planes(page[..., : self.key_code_bytes], self.key_planes, transposed=False)
        v = unpack_planes(
            page[..., self.value_code_offset : end], self.value_planes, transposed=True
        )
        return (
            planes_to_codes(k, self.key_bits),
            planes_to_codes(v, self.value_bits),
            self.unpack_ranges(page),
        )

    def unpack_ranges(self, page: torch.Tensor) -> torch.Tensor:
        """K scale, K offset, V scale, V offset ``[..., 4, D]`` of uint8 ``[..., head_bytes]``."""
        ranges = page[..., self.range_offset :].contiguous().view(self.dtype)
        return ranges.unflatten(-1, (4, self.head_size))

    def _pad(self, planes: torch.Tensor) -> torch.Tensor:
        missing = self.tokens - planes.shape[-2]
        return torch.nn.functional.pad(planes, (0, 0, 0, missing))


def sections(planes: int) -> tuple[int, ...]:
    """Sizes of the sections of a part: powers of two, the largest first."""
    return tuple(1 << i for i in reversed(range(planes.bit_length())) if planes >> i & 1)


def tile_slots(planes: int) -> int:
    """Sub-slots in a full tile of a section: as many as give each lane 16 bytes, 1 to 4."""
    return min(max(1, 256 // planes), 4)


def tiles(slots: int, planes: int) -> list[tuple[int, int]]:
    """First sub-slot and number of sub-slots of the tiles of a section."""
    out, first, size = [], 0, tile_slots(planes)
    while first < slots:
        if first + size > slots:
            size //= 2
        else:
            out.append((first, size))
            first += size
    return out


# On a GPU each copy from the host would be waited for.


@lru_cache(maxsize=256)
def _plane_map_on(device: torch.device, bits: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    component, bit = plane_map(bits)
    return component.to(device), bit.to(device)


@lru_cache(maxsize=64)
def _bit_positions_on(
    device: torch.device, slots: int, planes: int, transposed: bool
) -> torch.Tensor:
    return _bit_positions(slots, planes, transposed).to(device)


def codes_to_planes(codes: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
    """Split integer codes uint8 ``[..., D]`` into bit planes uint8 ``[..., P]`` of 0 and 1."""
    component, bit = _plane_map_on(codes.device, bits)
    planes = (codes[..., component] >> bit.clamp(min=0)) & 1
    return planes * (bit >= 0)


def planes_to_codes(planes: torch.Tensor, bits: tuple[int, ...]) -> torch.Tensor:
    """Join bit planes uint8 ``[..., P]`` into integer codes uint8 ``[..., D]``."""
    component, bit = _plane_map_on(planes.device, bits)
    weighted = (planes << bit.clamp(min=0)) * (bit >= 0)
    codes = planes.new_zeros((*planes.shape[:-1], len(bits)))
    return codes.index_add_(-1, component, weighted.to(codes.dtype))


@lru_cache(maxsize=64)
def _bit_positions(slots: int, planes: int, transposed: bool) -> torch.Tensor:
    """Position of every code bit of a part.

    Returns int64 ``[slots * 16 * planes]``: for each (token, plane) in row-major order, the index
    of its bit in the part, counting bits of a byte and bytes of a word from the low end.
    """
    where = torch.empty(slots * BLOCK_SIZE, planes, dtype=torch.int64)
    first_plane = 0
    for size in sections(planes):
        for first, count in tiles(slots, size):
            token, plane = torch.meshgrid(
                torch.arange(count * BLOCK_SIZE), torch.arange(size), indexing="ij"
            )
            in_token, in_plane = token % GROUP, plane % GROUP
            row, column = (in_plane, in_token) if transposed else (in_token, in_plane)
            lane, half = row * 4 + column // 2, column % 2
            pair = token // GROUP * (size // GROUP) + plane // GROUP
            words = count * size // 64  # of a lane
            begin = slots * first_plane // 2 + first * size // 2
            bit = (begin + lane * words + pair // 16) * 32 + half * 16 + pair % 16
            rows = slice(first * BLOCK_SIZE, (first + count) * BLOCK_SIZE)
            where[rows, first_plane : first_plane + size] = bit
        first_plane += size
    return where.flatten()


def pack_planes(planes: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """Code bytes of a part.

    Parameters
    ----------
    planes
        uint8 ``[..., slots * 16, P]`` of 0 and 1.
    transposed
        False for K (tokens are rows of the fragment), True for V (planes are rows).

    Returns
    -------
    torch.Tensor
        uint8 ``[..., slots * 2 * P]``.
    """
    tokens, p = planes.shape[-2:]
    where = _bit_positions_on(planes.device, tokens // BLOCK_SIZE, p, transposed)
    bits = torch.empty_like(planes.flatten(-2))
    bits[..., where] = planes.flatten(-2)
    weights = (1 << torch.arange(8, device=planes.device)).to(torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_planes(code: torch.Tensor, planes: int, *, transposed: bool) -> torch.Tensor:
    """Inverse of :func:`pack_planes`: ``[..., slots * 2 * P]`` to ``[..., slots * 16, P]``."""
    slots = code.shape[-1] * 8 // planes // BLOCK_SIZE
    where = _bit_positions_on(code.device, slots, planes, transposed)
    shifts = torch.arange(8, device=code.device, dtype=torch.uint8)
    bits = ((code[..., None] >> shifts) & 1).flatten(-2)
    return bits[..., where].unflatten(-1, (slots * BLOCK_SIZE, planes))
