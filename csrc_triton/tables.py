"""What the kernels need to know of a page format: plane tables on the device.

A kernel meets a page as 32-bit words.  :class:`DeviceFormat` holds, for K and for V, the plane of
every bit of every component, so that one kernel serves uniform and per-component widths alike, and
the numbers that the range estimator needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import torch

from vllm_calibquant.format import BLOCK_SIZE, PageFormat, plane_map

BLOCK = BLOCK_SIZE
"""Tokens of a text block and of a sub-slot."""

MAX_KEY_PLANES, MAX_VALUE_PLANES = 384, 256
"""Most planes of a part that the Gluon kernels for components of any width have registers for."""

SCORE_EXP = 30
"""Gluon kernels multiply scores by ``2**-SCORE_EXP`` (:mod:`csrc_triton.fragments`)."""


@dataclass(frozen=True)
class DeviceFormat:
    """A :class:`~vllm_calibquant.format.PageFormat` on a device.

    Parameters
    ----------
    page
        Byte map of a page; ``page.dtype`` must be ``torch.bfloat16`` or ``torch.float16``.
    device
        Where the tables live.
    key_clip, value_clip, key_mix, value_mix
        Weights a and b of a range, each a number or one for each of the D components: of a page's
        extremes m and M the codes span ``a m + b M .. a M + b m``.  ``a = c, b = 0`` scales both
        ends by c (method.md); ``a = (1 + c) / 2, b = (1 - c) / 2`` shrinks the range by c around
        its midpoint.

    Attributes
    ----------
    key_plane, value_plane : torch.Tensor
        int32 ``[max bits, D]``: the plane of bit b of component j, or -1.
    key_source, value_source : torch.Tensor
        int32 ``[2, P]``: component and bit of every plane; bit -1 for a padding plane.
    key_weights : torch.Tensor
        bfloat16 ``[P]``: what the query's component is multiplied by for every plane of K, so that
        the products of code bits add up to scores times ``2**-SCORE_EXP``.
    key_pairs, value_pairs : torch.Tensor or None
        int32 ``[P / 2]``: which pair of components two neighbouring planes belong to; None if
        there are neighbours that are no such pair.
    key_clips, value_clips, key_mixes, value_mixes : torch.Tensor
        float32 ``[D]``: a and b of each component.
    key_levels, value_levels : torch.Tensor
        float32 ``[D]``: ``2**bits - 1`` of each component; 0 for a component without codes, which
        keeps its page mean.

    Raises
    ------
    ValueError
        If the dtype is not a 16-bit one.
    """

    page: PageFormat
    device: torch.device | str
    key_clip: float | tuple[float, ...] = 0.5
    value_clip: float | tuple[float, ...] = 0.3
    key_mix: float | tuple[float, ...] = 0.0
    value_mix: float | tuple[float, ...] = 0.0
    key_plane: torch.Tensor = field(init=False, repr=False, compare=False)
    value_plane: torch.Tensor = field(init=False, repr=False, compare=False)
    key_source: torch.Tensor = field(init=False, repr=False, compare=False)
    value_source: torch.Tensor = field(init=False, repr=False, compare=False)
    key_weights: torch.Tensor = field(init=False, repr=False, compare=False)
    key_pairs: torch.Tensor | None = field(init=False, repr=False, compare=False)
    value_pairs: torch.Tensor | None = field(init=False, repr=False, compare=False)
    key_clips: torch.Tensor = field(init=False, repr=False, compare=False)
    value_clips: torch.Tensor = field(init=False, repr=False, compare=False)
    key_mixes: torch.Tensor = field(init=False, repr=False, compare=False)
    value_mixes: torch.Tensor = field(init=False, repr=False, compare=False)
    key_levels: torch.Tensor = field(init=False, repr=False, compare=False)
    value_levels: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.page.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"the kernels serve 16-bit models, got {self.page.dtype}")
        for name, bits, clip, mix in (
            ("key", self.page.key_bits, self.key_clip, self.key_mix),
            ("value", self.page.value_bits, self.value_clip, self.value_mix),
        ):
            for table, weights in (("clips", clip), ("mixes", mix)):
                x = torch.as_tensor(weights, dtype=torch.float32).expand(self.page.head_size)
                object.__setattr__(self, f"{name}_{table}", x.contiguous().to(self.device))
            levels = torch.tensor([2.0**b - 1 for b in bits], device=self.device)
            object.__setattr__(self, f"{name}_plane", _plane_table(bits).to(self.device))
            source = torch.stack(plane_map(bits)).to(torch.int32).to(self.device)
            object.__setattr__(self, f"{name}_source", source)
            object.__setattr__(self, f"{name}_pairs", _pairs(source))
            object.__setattr__(self, f"{name}_levels", levels)
        object.__setattr__(self, "key_weights", _query_weights(self.key_source))

    @cached_property
    def uniform_bits(self) -> int:
        """Bits of every component of K and V, or 0 if they differ."""
        widths = set(self.page.key_bits) | set(self.page.value_bits)
        return widths.pop() if len(widths) == 1 else 0

    @cached_property
    def full_page_bits(self) -> int:
        """The same where pages have as many sub-slots as fit, else 0."""
        bits, page = self.uniform_bits, self.page
        most = PageFormat.uniform(page.head_size, bits).slots if bits else 0
        return bits if page.slots == most else 0

    @property
    def whole_words(self) -> bool:
        """Whether the plain kernel reads codes as whole words; else it gathers them."""
        return self.page.head_size in (64, 128) and self.uniform_bits > 0


def serves_uniform(fmt: DeviceFormat) -> bool:
    """Whether the Gluon kernels for components of one width serve a format."""
    return fmt.page.head_size in (64, 128) and fmt.full_page_bits in (1, 2, 4)


def serves_planes(fmt: DeviceFormat) -> bool:
    """Whether the Gluon kernels for components of any width serve a format."""
    return (
        fmt.page.head_size in (64, 128)
        and fmt.key_pairs is not None
        and fmt.value_pairs is not None
        and fmt.page.key_planes <= MAX_KEY_PLANES
        and fmt.page.value_planes <= MAX_VALUE_PLANES
    )


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; Triton's own does for constants of kernels too, and takes 5 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, likewise."""
    return 1 << (n - 1).bit_length()


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; ``(0, 0)`` for anything else.  Launchers ask several times a layer."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _plane_table(bits: tuple[int, ...]) -> torch.Tensor:
    component, bit = plane_map(bits)
    table = torch.full((max(max(bits), 1), len(bits)), -1, dtype=torch.int32)
    real = bit >= 0
    planes = torch.arange(len(bit), dtype=torch.int32)
    table[bit[real], component[real]] = planes[real]
    return table


def _query_weights(source: torch.Tensor) -> torch.Tensor:
    """:attr:`DeviceFormat.key_weights`; the twin of ``csrc_triton.fragments.query_weight``."""
    planes = source.shape[1]
    pieces = [128] * (planes // 128) + [b for b in (64, 32, 16, 8) if planes & b]
    block = torch.cat([torch.arange(n) // 8 for n in pieces])  # bit of a half-word
    encoded = torch.ones(16, dtype=torch.int32) << torch.arange(16)
    power = encoded.to(torch.int16).view(torch.bfloat16).double()
    power[15] = -2.0  # the sign: a code bit is half of 1 minus what is read
    bit = source[1].cpu()
    weights = torch.where(bit >= 0, 2.0 ** (bit - SCORE_EXP) / power[block], 0.0)
    return weights.bfloat16().to(source.device)


def _pairs(source: torch.Tensor) -> torch.Tensor | None:
    even, odd = source[0, ::2], source[0, 1::2]
    padding = source[1] < 0
    paired = (even % 2 == 0) & (odd == even + 1) | padding[::2]
    if (padding[::2] != padding[1::2]).any() or not paired.all():
        return None
    return even // 2


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on a GPU; 0 for anything else."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def pipeline_stages(fmt: DeviceFormat, device: torch.device) -> int:
    """Stages of the plain kernel's loop that fit into shared memory.

    With one, a program takes at most 80 KiB.  Three stages of one-bit components take at most 44
    where codes are read as whole words, and 208 where they are gathered one by one: Hopper and
    datacentre GPUs after it have 227, others from Ampere on 99 to 163.
    """
    bits = max(fmt.key_plane.shape[0], fmt.value_plane.shape[0])
    few = bits * next_power_of_2(fmt.page.head_size) <= 128
    return 3 if few and (fmt.whole_words or shared_memory(device) >= 227 << 10) else 1


def cache_words(kv_cache: torch.Tensor) -> torch.Tensor:
    """The KV cache of a layer as 32-bit words.

    Parameters
    ----------
    kv_cache
        16-bit ``[num_blocks, num_kv_heads, 16, 2 D]``; each (page, head) is one contiguous run.

    Returns
    -------
    torch.Tensor
        int32 ``[num_blocks, num_kv_heads, 16, D]``, the same bytes.

    Raises
    ------
    ValueError
        If a (page, head) is not contiguous.
    """
    rows, width = kv_cache.shape[2:]
    if rows != BLOCK or kv_cache.stride(3) != 1 or kv_cache.stride(2) != width:
        raise ValueError(
            f"a page of a KV head must be one contiguous run of {BLOCK} rows; got shape "
            f"{tuple(kv_cache.shape)} with strides {kv_cache.stride()}"
        )
    return kv_cache.view(torch.int32)
