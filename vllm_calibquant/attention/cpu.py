"""CPU backend: vLLM's own kernels for text, the plain PyTorch reference where pages hold codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_calibquant.attention.common import (
    MixedBackend,
    MixedLayer,
    bind_layers,
)
from vllm_calibquant.attention.reference import VisualPages, mixed_attention
from vllm_calibquant.attention.store import store_visual, visual_mask
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.format import BLOCK_SIZE, GROUP
from vllm_calibquant.tags import is_visual, page_of, slot_of


@dataclass(frozen=True)
class RequestView:
    """What one request of a batch with visual pages reads."""

    tokens: slice
    """Its new tokens in the batch."""
    text_pages: torch.Tensor
    """int64 ``[B]`` pages of its cached text blocks, in order."""
    text_tokens: torch.Tensor
    """int64 ``[n]`` its cached text tokens, as offsets into those pages laid end to end."""
    visual_pages: torch.Tensor
    """int64 ``[P]`` pages of its cached visual blocks, each once."""
    visual_slots: torch.Tensor
    """bool ``[P, slots]`` sub-slots that it refers to."""


def request_views(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    block_size: int,
    slots: int,
) -> list[RequestView]:
    """Split the rows of a block table into text and visual pages.

    Parameters
    ----------
    block_table
        int32 ``[num_reqs, max_blocks]`` tagged ids; a row is stale past its length.
    query_start_loc
        int32 ``[num_reqs + 1]``.
    seq_lens
        int32 ``[num_reqs]`` tokens of each request, the new ones included.
    block_size, slots
        Tokens of a block, sub-slots of a page.
    """
    views = []
    starts = query_start_loc.tolist()
    for row, start, end, length in zip(
        block_table, starts, starts[1:], seq_lens.tolist(), strict=False
    ):
        context = length - (end - start)
        ids = row[: -(-context // block_size)].long()
        coded = is_visual(ids)
        # Text blocks are full but the last, so their tokens are a prefix of their pages end to end,
        # unless the last block of the context is one that this step goes on filling.
        filled = torch.full_like(ids, block_size)
        if len(ids):
            filled[-1] = context - (len(ids) - 1) * block_size
        text_tokens = torch.arange(int(filled[~coded].sum()))
        pages, index = torch.unique(page_of(ids[coded]), return_inverse=True)
        used = torch.zeros(len(pages), slots, dtype=torch.bool)
        used[index, slot_of(ids[coded])] = True
        views.append(RequestView(slice(start, end), ids[~coded], text_tokens, pages, used))
    return views


@dataclass
class Step:
    """What layers know of a step when they write its tokens; one for all layers."""

    requests: list[slice] = field(default_factory=list)
    """New tokens of each request in the batch."""


@dataclass
class MixedCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the views of the requests if any page of the batch holds codes."""

    views: list[RequestView] | None = None


class MixedCPUBackend(MixedBackend, CPUAttentionBackend):
    """vLLM's CPU backend with 16-token pages, some of which hold codes."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Every size that vLLM's CPU kernels and the page format take."""
        return [d for d in CPUAttentionBackend.get_supported_head_sizes() if d % GROUP == 0]

    @staticmethod
    def get_impl_cls() -> type[MixedCPUImpl]:
        """Class of the layers."""
        return MixedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[MixedCPUMetadataBuilder]:
        """Class of the metadata builder."""
        return MixedCPUMetadataBuilder


class PlainCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend for layers left at the model's precision beside mixed ones.

    Its kernels read 16-token pages (``vec16``) with results equal to those for larger pages; only
    its list of block sizes leaves them out.
    """

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Sixteen, the block size of the mixed layers."""
        return [BLOCK_SIZE]


class MixedCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Tells layers of a step whose tokens are whose, and adds views where pages hold codes."""

    kv_cache_spec: MixedPageSpec

    def __init__(
        self,
        kv_cache_spec: MixedPageSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        bind_layers(vllm_config, layer_names, device)
        self.step = Step()
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for layer in layers.values():
            layer.impl.step = self.step

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """Metadata of a step."""
        common = common_attn_metadata
        metadata = super().build(common_prefix_len, common, fast_build)
        starts = metadata.query_start_loc[: common.num_reqs + 1].tolist()
        self.step.requests = [slice(start, end) for start, end in pairwise(starts)]
        table = metadata.block_table[: common.num_reqs]
        blocks = -(-metadata.seq_lens[: common.num_reqs] // self.block_size)
        inside = torch.arange(table.shape[1]) < blocks[:, None]
        views = None
        if bool((is_visual(table) & inside).any()):
            views = request_views(
                table,
                metadata.query_start_loc,
                metadata.seq_lens,
                block_size=self.block_size,
                slots=self.kv_cache_spec.slots,
            )
        return MixedCPUMetadata(**vars(metadata), views=views)


class MixedCPUImpl(MixedLayer, CPUAttentionBackendImpl):
    """One attention layer with mixed pages."""

    step: Step
    """The metadata builder puts its own here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_mixed()

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the tokens of a step: text as vLLM does, visual tokens as codes.

        A page that turns from visual to text holds code bytes, which read as NaN and Inf, and
        kernels compute ``0 * NaN`` past a sequence's end: a text block is cleared when its first
        slot is written.
        """
        first = slot_mapping[(slot_mapping >= 0) & (slot_mapping % BLOCK_SIZE == 0)] // BLOCK_SIZE
        kv_cache[first[~is_visual(first)]] = 0
        coded = visual_mask(slot_mapping, BLOCK_SIZE)
        if not coded.any():
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        key, value = key[: len(slot_mapping)], value[: len(slot_mapping)]
        for some in self.range_groups(coded):
            store_visual(key[some], value[some], as_bytes(kv_cache), slot_mapping[some], self.codec)
        text = ~coded & (slot_mapping >= 0)
        if text.any():
            super().do_kv_cache_update(layer, key[text], value[text], kv_cache, slot_mapping[text])

    def range_groups(self, coded: torch.Tensor) -> Iterator[torch.Tensor]:
        """Masks of visual tokens that are coded in one call: all, or those of one request.

        ``coded`` and each mask are bool ``[T]``; together the masks are ``coded``.
        """
        if self.codec.range_scope == "page":
            yield coded
            return
        for tokens in self.step.requests:
            if coded[tokens].any():
                some = torch.zeros_like(coded)
                some[tokens] = coded[tokens]
                yield some

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step; shapes as in vLLM's CPU backend."""
        views = attn_metadata.views if attn_metadata is not None else None
        if views is None:
            return super().forward(
                layer,  # type: ignore[arg-type]
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        kv_bytes = as_bytes(kv_cache)
        slot_tokens = torch.arange(self.codec.page_format.tokens) // BLOCK_SIZE
        for view in views:
            cached_key, cached_value = read_text(kv_cache[view.text_pages])
            visual = None
            if len(view.visual_pages):
                used = view.visual_slots[:, slot_tokens]
                visual = VisualPages(kv_bytes[view.visual_pages], used)
            output[view.tokens] = mixed_attention(
                query[view.tokens],
                torch.cat([cached_key[view.text_tokens], key[view.tokens]]),
                torch.cat([cached_value[view.text_tokens], value[view.tokens]]),
                visual,
                page_format=self.codec.page_format,
                scale=self.scale,
                calibration=self.calibration,
                basis=self.codec.basis,
            )
        return output


def as_bytes(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache of a layer as uint8 ``[pages, Hkv, head_bytes]``, without a copy."""
    return kv_cache.view(torch.uint8).flatten(2)


def read_text(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of text pages.

    vLLM's CPU kernels keep the K of 16 tokens as ``[D, 16]`` and their V as ``[16, D]`` (the
    instruction sets it calls ``vec16`` and ``neon``), for each head one after the other.

    Parameters
    ----------
    pages
        ``[B, Hkv, 16, 2 D]``.

    Returns
    -------
    key, value : torch.Tensor
        ``[B * 16, Hkv, D]``.
    """
    blocks, heads, tokens, width = pages.shape
    key, value = pages.reshape(blocks, heads, 2, tokens * width // 2).unbind(2)
    key = key.unflatten(-1, (width // 2, tokens)).permute(0, 3, 1, 2)
    value = value.unflatten(-1, (tokens, width // 2)).permute(0, 2, 1, 3)
    return key.flatten(0, 1), value.flatten(0, 1)
