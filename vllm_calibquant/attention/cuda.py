"""CUDA backend: vLLM's FlashAttention for all that is text, our kernels for pages of codes.

A step is served in one of three ways:

* *stock*: no request of the batch has a visual page, which the host knows; vLLM's own path, which
  has CUDA graphs of its own (:mod:`vllm_calibquant.text_graphs`).
* *decode*: every request has one new token.  FlashAttention reads the text blocks through a compact
  block table, our split kernel reads the visual pages, and a merge joins the two.  This is the way
  that the other CUDA graphs hold.  The kernels come one after the other there too: in a branch
  beside it, the split kernel keeps FlashAttention off the multiprocessors and gains nothing.
* *mixed*: decodes as above, and requests with more new tokens.  Where all new tokens are text, as
  those of a question about a cached image are, one call of FlashAttention serves the text of all
  requests.  Otherwise the new tokens among themselves (from K and V in hand, so that prefill is
  exact), the cached text and the cached visual pages are three parts; or one, if little or nothing
  but text is cached: it is put before the new K and V.  Few decodes beside few other tokens go as
  requests of the second kind.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_layout import KVCacheLayout

import csrc_triton as kernels
from vllm_calibquant.attention.common import (
    MixedBackend,
    MixedLayer,
    bind_layers,
)
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.attention.warmup import warm_up
from vllm_calibquant.block_rows import BLOCK_ROWS
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.format import BLOCK_SIZE
from vllm_calibquant.quantize import RangeEstimator
from vllm_calibquant.text_graphs import GRAPH_KIND

logger = init_logger("vllm.calibquant")  # under vLLM's logger, which is the one with a handler


class MixedCUDABackend(MixedBackend, FlashAttentionBackend):
    """vLLM's FlashAttention backend with 16-token pages, some of which hold codes."""

    # One op of a layer writes and attends; the host pays for each.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[MixedCUDAImpl]:
        """Class of the layers."""
        return MixedCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[MixedCUDAMetadataBuilder]:
        """Class of the metadata builder."""
        return MixedCUDAMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major: what the page format describes is one run of bytes for each KV head."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The only block size there is."""
        return cls.get_supported_kernel_block_sizes()[0]  # type: ignore[return-value]


@dataclass
class Joined:
    """Where keys of prefills lie once cached text is put before the new tokens."""

    block_table: torch.Tensor
    """int32 ``[num_requests, blocks]``."""
    start_loc: torch.Tensor
    """int32 ``[num_requests + 1]``."""
    num_keys: int
    """At most."""
    max_len: int
    """Most of one request, at most."""


@dataclass
class Prefills:
    """The requests of a mixed step that have more than one new token."""

    first_request: int
    num_requests: int
    tokens: slice
    """Their rows in the batch."""
    max_query_len: int
    """Most new tokens of one of them."""
    query_lens: tuple[int, ...]
    """New tokens of each."""
    query_start_loc: torch.Tensor
    """int32 ``[num_requests + 1]``, counted from their first row."""
    batch_query_start_loc: torch.Tensor
    """int32 ``[num_reqs + 1]`` of the whole batch."""
    only_text: bool
    """Whether all new tokens are text: FlashAttention serves them with the decodes."""
    has_context: bool
    """Whether there is more to see: cached visual tokens, or cached text if that is not served."""
    joined: Joined | None
    """What else to do about the context, if it is not much and text alone."""


@dataclass
class Step:
    """What layers know of a step when they write its tokens; one for all layers."""

    tables: kernels.StepTables
    """Which visual pages it writes."""
    codes: bool = True
    """Whether a new token may be visual."""
    stock: bool = False
    """Whether vLLM's own op can write it: text alone, in pages that never held codes, no graph."""


@dataclass
class MixedCUDAMetadata(FlashAttentionMetadata):
    """vLLM's metadata of the step, or where pages hold codes, of its part that is text."""

    visual: bool = False
    """Whether a page of the batch may hold codes; False means vLLM's own path."""
    num_decodes: int = 0
    """Requests, first in the batch, with one new token."""
    prefills: Prefills | None = None


FEW_ROWS, FEW_CACHED = 2048, 32768
"""Requests with one new token beside others with more are served as those are, if all requests have
room for so many new tokens together and theirs have so many cached ones: the host bounds such a
step, and two launches a layer are saved.
"""


class MixedCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Builds the tables of a step once for all layers."""

    kv_cache_spec: MixedPageSpec
    # Graphs hold decodes; other batches take the way that the host chooses.
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    supports_update_block_table = False
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        kv_cache_spec: MixedPageSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM pads the block table's rows; a wider buffer than needed costs little.
        width = kv_cache_spec.max_num_blocks_per_req(
            vllm_config, vllm_config.model_config.max_model_len
        )
        self.tables = kernels.allocate_tables(
            max_num_reqs=max(
                vllm_config.scheduler_config.max_num_seqs, self.max_cudagraph_size or 0
            ),
            max_num_blocks=-(-width // 128) * 128 + 128,
            max_num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            slots=kv_cache_spec.slots,
            num_kv_heads=kv_cache_spec.num_kv_heads,
            device=device,
        )
        self.no_pages = replace(self.tables, plan=torch.zeros_like(self.tables.plan))
        self.step = Step(self.tables)
        bind_layers(vllm_config, layer_names, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # While a profile is searched for, widths change.
        learned = any(layer.impl.profile is not None for layer in layers.values())
        planes = kernels.MAX_VALUE_PLANES if learned else 0
        scratch = _shared_scratch(vllm_config, self.tables, self.num_heads_q, self.headdim, planes)
        for layer in layers.values():
            layer.impl.tables = self.tables
            layer.impl.scratch = scratch
            layer.impl.step = self.step
        warm_up(self, layers, images=vllm_config.model_config.is_multimodal_model)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> MixedCUDAMetadata:
        """Metadata of a dummy batch, of the kind that is being captured."""
        GRAPH_KIND.text = GRAPH_KIND.capturing_text
        return self._build(common_attn_metadata, False, visual=not GRAPH_KIND.text)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> MixedCUDAMetadata:
        """Metadata of a step."""
        requests = common_attn_metadata.req_idx
        rows = [] if requests is None else requests.tolist()
        visual = BLOCK_ROWS.any_visual(rows)
        GRAPH_KIND.text = not visual
        spans: list[range] = []  # a step of decodes, the frequent one, has no use for them
        if visual and common_attn_metadata.max_query_len > 1:
            spans = [
                range(
                    BLOCK_ROWS.visual_begin(row) * BLOCK_SIZE,
                    BLOCK_ROWS.visual_end(row) * BLOCK_SIZE,
                )
                for row in rows
            ]
        codes = _any_new(common_attn_metadata, spans)
        stock = not (codes or BLOCK_ROWS.any_recycled(rows))
        return self._build(common_attn_metadata, fast_build, visual, spans, codes, stock)

    def _build(
        self,
        common: CommonAttentionMetadata,
        fast_build: bool,
        visual: bool,
        spans: list[range] | None = None,
        codes: bool = True,
        stock: bool = False,
    ) -> MixedCUDAMetadata:
        """Metadata of a step.

        Parameters
        ----------
        common, fast_build
            As for :meth:`build`.
        visual
            Whether a page of the batch may hold codes.
        spans
            From the first to the last visual token of each request; None if nobody knows.
        codes
            Whether a new token may be visual.
        stock
            Whether vLLM's own op can write the new tokens.
        """
        prefills = common.max_query_len > 1
        self.step.codes = codes and prefills  # a request with one new token has filled no page
        self.step.stock = stock
        self.step.tables = self.tables if visual else self.no_pages
        if not visual:
            return MixedCUDAMetadata(**vars(super().build(0, common, fast_build)))
        num_decodes, num_prefills, num_decode_tokens = self._build_tables(common)
        tables, only_text = self.tables, not codes
        # What FlashAttention sees: the text of the decodes, or of all requests.
        num_reqs = common.num_reqs if only_text else num_decodes
        text = copy(common)  # dataclasses.replace takes several times as long
        vars(text).update(
            num_reqs=num_reqs,
            num_actual_tokens=common.num_actual_tokens if only_text else num_decode_tokens,
            max_query_len=common.max_query_len if only_text else 1,
            query_start_loc=common.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=common.query_start_loc_cpu[: num_reqs + 1],
            block_table_tensor=tables.text_block_table[:num_reqs],
            seq_lens=tables.text_lens[:num_reqs],
        )
        if num_reqs:
            metadata = MixedCUDAMetadata(**vars(super().build(0, text, fast_build)))
        else:
            metadata = MixedCUDAMetadata(
                num_actual_tokens=0,
                max_query_len=1,
                query_start_loc=text.query_start_loc,
                max_seq_len=common.max_seq_len,
                seq_lens=text.seq_lens,
                block_table=text.block_table_tensor,
                slot_mapping=common.slot_mapping,
            )
        metadata.visual = visual
        metadata.num_decodes = num_decodes
        if num_prefills:
            new, contexts = _new_and_cached(common)
            seen = None  # tokens of each request that are cached, or the visual ones among all
            if spans is not None:
                seen = [span.stop for span in spans] if only_text else contexts
            joined = None
            if not only_text and spans is not None:
                joined = _join(common, num_decodes, spans, contexts)
            metadata.prefills = Prefills(
                first_request=num_decodes,
                num_requests=num_prefills,
                tokens=slice(num_decode_tokens, common.num_actual_tokens),
                max_query_len=common.max_query_len,
                query_lens=tuple(new[num_decodes:]),
                query_start_loc=common.query_start_loc[num_decodes : common.num_reqs + 1]
                - num_decode_tokens,
                batch_query_start_loc=common.query_start_loc,
                only_text=only_text,
                has_context=seen is None or max(seen[num_decodes:]) > 0,
                joined=joined,
            )
        return metadata

    def _build_tables(self, common: CommonAttentionMetadata) -> tuple[int, int, int]:
        """Fill the step's tables; returns numbers of decodes, prefills, and decodes' tokens."""
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=1
        )
        if num_prefills and common.num_reqs * common.max_query_len <= FEW_ROWS:
            cached = common.seq_lens_cpu_upper_bound[:num_decodes].sum().item()
            if cached <= FEW_CACHED:
                num_decodes, num_prefills, num_decode_tokens = 0, common.num_reqs, 0
        kernels.build_tables(
            self.tables,
            common.block_table_tensor,
            common.seq_lens,
            common.query_start_loc,
            common.slot_mapping,
            num_decodes=num_decodes,
        )
        return num_decodes, num_prefills, num_decode_tokens


class MixedCUDAImpl(MixedLayer, FlashAttentionImpl):
    """One attention layer with mixed pages."""

    tables: kernels.StepTables
    """Tables of the step; the metadata builder puts its own here."""
    scratch: kernels.DecodeScratch
    step: Step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.init_mixed()
        self.quantile = self.config.quantile if self.config.estimator == "quantile" else None

    def use_codec(self, codec: Codec) -> None:
        """Store and read pages with a codec from now on; see :class:`MixedLayer`."""
        super().use_codec(codec)
        device = torch.device("cuda", torch.cuda.current_device())
        self.page_format = kernels.DeviceFormat(
            codec.page_format,
            device,
            **_weights("key", codec.key_estimator),
            **_weights("value", codec.value_estimator),
        )
        basis = codec.basis
        self.turns = None if basis is None else kernels.Turns.of(basis, self.page_format)
        fast = kernels.gluon_serves(self.page_format, self.num_queries_per_kv, device)
        planes = codec.page_format.key_planes + codec.page_format.value_planes
        logger.info_once(
            "Visual pages are decoded by the %s kernel (head size %d, %g bits, sm_%d%d).",
            "Gluon" if fast else "plain Triton",
            self.head_size,
            planes / (2 * self.head_size),
            *torch.cuda.get_device_capability(device),
        )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the tokens of a step: text as it is, visual tokens as codes."""
        if self.step.stock:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        n = slot_mapping.shape[0]
        key, value = key[:n], value[:n]
        basis = self.codec.basis
        if basis is not None and self.step.codes:
            key, value = kernels.encode(key, value, slot_mapping, basis)
        kernels.store(
            self.step.tables,
            self.page_format,
            key,
            value,
            kv_cache,
            slot_mapping,
            quantile=self.quantile,
        )

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
        """Write the tokens of a step and attend; shapes as in vLLM's FlashAttention backend."""
        if attn_metadata is not None:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        if attn_metadata is None or not attn_metadata.visual:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        text = self._text(query, kv_cache, attn_metadata)
        if n := attn_metadata.num_decodes:
            self._decode(query[:n], kv_cache, (text[0][:n], text[1][:, :n]), output[:n])
        if attn_metadata.prefills is not None:
            self._prefill(query, key, value, kv_cache, attn_metadata, text, output)
        return output

    def _text(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: MixedCUDAMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over text blocks, this step's own among them, of the requests of the metadata.

        Returns
        -------
        tuple
            Output ``[tokens, Hq, D]`` and log-sum-exp, float32 ``[Hq, tokens]``.
        """
        if metadata.num_actual_tokens == 0:
            return query[:0], query.new_empty((self.num_heads, 0), dtype=torch.float32)
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return flash_attn_varlen_func(
            q=query[: metadata.num_actual_tokens],
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=metadata.block_table,
            scheduler_metadata=metadata.scheduler_metadata,
            num_splits=metadata.max_num_splits,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,
        )

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
        output: torch.Tensor,
    ) -> None:
        """Attention of one new token of each request, given that of their text."""
        kernels.decode_attention(
            self.tables,
            self.scratch,
            self.page_format,
            query,
            kv_cache,
            output,
            scale=self.scale,
            calibration=self.calibration,
            text=text,
            basis=self.turns,
        )

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: MixedCUDAMetadata,
        text: tuple[torch.Tensor, torch.Tensor],
        output: torch.Tensor,
    ) -> None:
        """Attention of the requests with more than one new token."""
        prefills = metadata.prefills
        assert prefills is not None
        rows = prefills.tokens
        if prefills.joined is not None or not (prefills.only_text or prefills.has_context):
            self._one_piece(query[rows], key[rows], value[rows], kv_cache, prefills, output[rows])
        elif not prefills.only_text:
            parts = self._own_and_text(query, key, value, kv_cache, metadata)
            codes = torch.empty_like(query[: rows.stop])
            lse = self._codes(query, kv_cache, prefills, codes)
            kernels.merge_parts(output[rows], [*parts, (codes[rows], lse[:, rows])])
        elif prefills.has_context:
            self._codes(query, kv_cache, prefills, output, text)
        else:
            output[rows].copy_(text[0][rows])

    def _one_piece(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        prefills: Prefills,
        output: torch.Tensor,
    ) -> None:
        """Attention over the step's own tokens and over cached text, which are in one piece."""
        starts, max_len = prefills.query_start_loc, prefills.max_query_len
        if prefills.joined is not None:
            joined = prefills.joined
            key, value = kernels.join_context(
                key, value, kv_cache, joined.block_table, starts, joined.start_loc, joined.num_keys
            )
            starts, max_len = joined.start_loc, joined.max_len
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=prefills.query_start_loc,
            max_seqlen_q=prefills.max_query_len,
            cu_seqlens_k=starts,
            max_seqlen_k=max_len,
            softmax_scale=self.scale,
            causal=True,
            fa_version=self.vllm_flash_attn_version,
        )

    def _own_and_text(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: MixedCUDAMetadata,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Attention over the step's own tokens, which may be visual, and over cached text.

        For contexts with visual tokens, or of much text.
        """
        prefills = metadata.prefills
        assert prefills is not None
        rows = prefills.tokens
        common = {
            "q": query[rows],
            "cu_seqlens_q": prefills.query_start_loc,
            "max_seqlen_q": prefills.max_query_len,
            "softmax_scale": self.scale,
            "return_softmax_lse": True,
            "fa_version": self.vllm_flash_attn_version,
        }
        own = flash_attn_varlen_func(
            k=key[rows],
            v=value[rows],
            cu_seqlens_k=prefills.query_start_loc,
            max_seqlen_k=prefills.max_query_len,
            causal=True,
            **common,
        )
        requests = slice(prefills.first_request, prefills.first_request + prefills.num_requests)
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        cached = flash_attn_varlen_func(
            k=key_cache,
            v=value_cache,
            seqused_k=self.tables.context_text_lens[requests],
            max_seqlen_k=metadata.max_seq_len,
            block_table=self.tables.text_block_table[requests],
            causal=False,
            **common,
        )
        return [own, cached]

    def _codes(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        prefills: Prefills,
        out: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of the same requests over cached visual tokens, and text that is done.

        Writes their rows of ``out`` and returns the log-sum-exp, float32 ``[Hq, tokens]``.
        """
        n = prefills.tokens.stop
        lse = query.new_empty((self.num_heads, n), dtype=torch.float32)
        kernels.prefill_attention(
            self.tables,
            self.page_format,
            query[:n],
            kv_cache,
            prefills.batch_query_start_loc,
            out[:n],
            lse,
            first_request=prefills.first_request,
            num_requests=prefills.num_requests,
            max_query_len=prefills.max_query_len,
            scale=self.scale,
            calibration=self.calibration,
            text=text,
            basis=self.turns,
            first_row=prefills.tokens.start,
            query_lens=prefills.query_lens,
        )
        return lse


_scratches: WeakValueDictionary[tuple[Any, ...], kernels.DecodeScratch] = WeakValueDictionary()


def _shared_scratch(
    engine: object, tables: kernels.StepTables, num_heads: int, head_size: int, planes: int
) -> kernels.DecodeScratch:
    """Buffers of a decode step, the same for all layers of an engine: one runs after the other.

    Layers at 16 bits can make a group of every other layer, and each would have 20 to 80 MiB at
    1,024 requests.
    """
    shape = (tables.max_items, tables.num_kv_heads, tables.page_rows.shape[1])
    key = (id(engine), tables.plan.device, *shape, num_heads, head_size, planes)
    scratch = _scratches.get(key)
    if scratch is None:
        scratch = _scratches[key] = kernels.allocate_scratch(tables, num_heads, head_size, planes)
    return scratch


def _new_and_cached(common: CommonAttentionMetadata) -> tuple[list[int], list[int]]:
    """New and cached tokens of each request; the latter at most, for decodes scheduled ahead."""
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    totals = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
    new = [end - begin for begin, end in pairwise(starts)]
    return new, [total - n for total, n in zip(totals, new, strict=True)]


def _any_new(common: CommonAttentionMetadata, spans: list[range]) -> bool:
    """Whether a request has a visual token that is not cached yet."""
    # The batch may be padded with more requests.
    pairs = zip(spans, _new_and_cached(common)[1], strict=False) if spans else ()
    return any(span.stop > cached for span, cached in pairs)


def _join(
    common: CommonAttentionMetadata, first: int, spans: list[range], contexts: list[int]
) -> Joined | None:
    """How to join what requests from the first one on have cached, if that is all text."""
    cached, num_requests = contexts[first:], common.num_reqs - first
    begin, *ends = common.query_start_loc_cpu[first : common.num_reqs + 1].tolist()
    codes = any(s.start < min(s.stop, c) for s, c in zip(spans[first:], cached, strict=False))
    if (
        codes
        or len(spans) < common.num_reqs
        or num_requests > kernels.MAX_JOINED
        or not 0 < sum(cached) <= ends[-1] - begin
    ):
        return None
    lengths = common.seq_lens[first : common.num_reqs]
    starts = lengths.new_zeros(num_requests + 1)
    torch.cumsum(lengths, 0, dtype=starts.dtype, out=starts[1:])
    totals = common.seq_lens_cpu_upper_bound[first : common.num_reqs]
    return Joined(
        block_table=common.block_table_tensor[first : common.num_reqs],
        start_loc=starts,
        num_keys=int(totals.sum()),
        max_len=int(totals.max()),
    )


def _weights(part: str, estimator: RangeEstimator) -> dict[str, Any]:
    """How a kernel finds the range of K or V, as arguments of ``DeviceFormat``."""
    if estimator.weights is None:
        raise ValueError(f"no kernel finds ranges as {estimator} does")  # refused at start
    clip, mix = (tuple(w.tolist()) if isinstance(w, torch.Tensor) else w for w in estimator.weights)
    return {f"{part}_clip": clip, f"{part}_mix": mix}
