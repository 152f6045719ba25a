"""Pools, requests and references that the kernel tests share; also used on the GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from csrc_triton import DeviceFormat
from csrc_triton.store import quantise
from vllm_calibquant.attention.basis import Basis, PartBasis
from vllm_calibquant.format import PageFormat
from vllm_calibquant.profile import LayerProfile, PartProfile
from vllm_calibquant.tags import page_of, slot_of, tag

BLOCK = 16


def make_format(
    head_size: int = 64,
    bits: int | tuple[tuple[int, ...], tuple[int, ...]] = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> DeviceFormat:
    """Format with the published clip factors of its width."""
    if isinstance(bits, int):
        page = PageFormat.uniform(head_size, bits, dtype)
        clips = (0.5, 0.3) if bits == 1 else (1.0, 1.0)
    else:
        page = PageFormat(head_size, *bits, dtype)
        clips = (0.6, 0.7)
    return DeviceFormat(page, device, *clips)


def counted_bits(head_size: int, *counts: int) -> tuple[int, ...]:
    """Bits of components of which ``counts[b]`` have more than b, the first ones."""
    return tuple(sum(n > j for n in counts) for j in range(head_size))


def make_format_on(fmt: DeviceFormat, device: str) -> DeviceFormat:
    """The same format with its tables on another device."""
    return DeviceFormat(fmt.page, device, fmt.key_clip, fmt.value_clip, fmt.key_mix, fmt.value_mix)


def make_basis(
    heads: int, head_size: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> Basis:
    """A basis some way off the identity."""

    def part():
        turn = torch.eye(head_size) + 0.3 * torch.randn(
            heads, head_size, head_size, generator=generator
        ) / head_size**0.5  # fmt: skip
        mean = torch.randn(heads, head_size, generator=generator)
        return PartProfile(turn, mean, (1,) * head_size, torch.ones(head_size))

    return Basis.of(LayerProfile(part(), part()), slice(0, heads), dtype, "cpu")


def on_device(basis: Basis, device: str) -> Basis:
    """The same basis on another device."""
    return Basis(
        *(
            PartBasis(*(x.to(device) for x in (p.forward, p.shift, p.inverse, p.mean)))
            for p in (basis.key, basis.value)
        )
    )


@dataclass
class Pool:
    """A KV cache filled with 0xFF, and what its pages hold after dequantisation."""

    fmt: DeviceFormat
    num_kv_heads: int
    num_pages: int
    device: str = "cpu"
    seed: int = 0
    key_bias: float = 0.0
    key: dict[int, torch.Tensor] = field(default_factory=dict)
    value: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        page = self.fmt.page
        raw = torch.full(
            (self.num_pages, self.num_kv_heads, page.head_bytes), 0xFF, dtype=torch.uint8
        )
        shape = (self.num_pages, self.num_kv_heads, BLOCK, 2 * page.head_size)
        self.cache = raw.view(page.dtype).view(shape)
        self.generator = torch.Generator().manual_seed(self.seed)
        order = list(range(self.num_pages))
        random.Random(self.seed).shuffle(order)
        self.free = order
        generator = torch.Generator().manual_seed(self.seed + 1)
        bias = self.key_bias * torch.randn(page.head_size, generator=generator)
        self.bias = bias.to(page.dtype)

    def numbers(self, *shape: int) -> torch.Tensor:
        """Random K or V with channels of different spread and mean, in the model's dtype."""
        x = torch.randn(*shape, generator=self.generator)
        spread = 0.3 + torch.rand(shape[-1], generator=self.generator)
        mean = torch.randn(shape[-1], generator=self.generator)
        return (x * spread + mean).to(self.fmt.page.dtype)

    def text_page(self) -> int:
        """Take a page and fill it with text."""
        page = self.free.pop()
        d = self.fmt.page.head_size
        rows = self.numbers(BLOCK, self.num_kv_heads, 2 * d)
        rows[..., :d] += self.bias
        self.cache[page] = rows.transpose(0, 1)
        self.key[page], self.value[page] = rows[..., :d], rows[..., d:]
        return page

    def visual_page(self, slots: int) -> int:
        """Take a page and fill ``slots`` sub-slots of it with codes; the others stay 0xFF."""
        page = self.free.pop()
        f = self.fmt.page
        n = slots * BLOCK
        key, value = (self.numbers(n, self.num_kv_heads, f.head_size) for _ in range(2))
        key += self.bias
        self.key[page], self.value[page] = torch.empty(key.shape), torch.empty(value.shape)
        for h in range(self.num_kv_heads):
            k, ks, ko = quantise(key[:, h], f.key_bits, self.fmt.key_clips.cpu(), f.dtype)
            v, vs, vo = quantise(value[:, h], f.value_bits, self.fmt.value_clips.cpu(), f.dtype)
            packed = f.pack(k, v, torch.stack([ks, ko, vs, vo]))
            keep_k = n * f.key_planes // 8 if slots == f.slots else f.key_code_bytes
            target = self.cache[page, h].view(torch.uint8).flatten()
            target[:keep_k] = packed[:keep_k]
            end = f.value_code_offset + f.value_code_bytes
            target[f.value_code_offset : end] = packed[f.value_code_offset : end]
            target[f.range_offset :] = packed[f.range_offset :]
            self.key[page][:, h] = k.float() * ks.float() + ko.float()
            self.value[page][:, h] = v.float() * vs.float() + vo.float()
        return page

    def tokens(self, ids: list[int], length: int, *, visual: bool) -> tuple[torch.Tensor, ...]:
        """K and V ``[n, Hkv, D]`` of the text or of the visual blocks among ``ids``."""
        d = self.fmt.page.head_size
        keys, values = (
            [torch.empty(0, self.num_kv_heads, d)],
            [torch.empty(0, self.num_kv_heads, d)],
        )
        for i, block in enumerate(ids):
            n = min(length - i * BLOCK, BLOCK)
            if n <= 0 or (slot_of(block) >= 0) != visual:
                continue
            begin = max(slot_of(block), 0) * BLOCK
            keys.append(self.key[page_of(block)][begin : begin + n].float())
            values.append(self.value[page_of(block)][begin : begin + n].float())
        return torch.cat(keys), torch.cat(values)


def make_request(pool: Pool, plan: list[int | tuple[int, int, int]]) -> list[int]:
    """Tagged ids of a request.

    ``plan`` lists, in logical order, either a number of text blocks or a visual run
    ``(sub-slots written to the page, first used, number used)``.
    """
    ids: list[int] = []
    for part in plan:
        if isinstance(part, int):
            ids += [pool.text_page() for _ in range(part)]
        else:
            written, first, used = part
            page = pool.visual_page(written)
            ids += [tag(page, first + s) for s in range(used)]
    return ids


def stale_table(requests: list[list[int]], width: int, seed: int = 1) -> torch.Tensor:
    """Block table whose entries past each request's blocks are random, often tagged, ids."""
    table = torch.randint(0, 15 << 23, (len(requests), width), dtype=torch.int32,
                          generator=torch.Generator().manual_seed(seed))  # fmt: skip
    for row, ids in zip(table, requests, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return table


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference; NaN counts as infinite."""
    error = (x.double().cpu() - reference.double().cpu()).norm() / reference.double().norm().cpu()
    return float("inf") if error.isnan() else error.item()
