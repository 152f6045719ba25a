"""Mixed pages in vLLM's own pool.

One logical block is one entry of a request's block list, as in stock vLLM; only what a step *takes*
from the pool differs, since up to 14 visual blocks share a page.  The layout of a step is decided
once, in :meth:`MixedPageManager.get_num_blocks_to_allocate`, and executed by
:meth:`MixedPageManager.allocate_new_blocks`, so that what is promised is what is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_calibquant.core.blocks import (
    Block,
    HashEntry,
    VisualBlock,
    distinct_pages,
    visual_pages,
)
from vllm_calibquant.core.layout import StepLayout, step_layout
from vllm_calibquant.core.ledger import VisualPageLedger
from vllm_calibquant.core.spans import Span, visual_spans
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.format import MAX_SLOTS
from vllm_calibquant.tags import MAX_PAGES


class MixedPageManager(FullAttentionManager):
    """Blocks of the layers that keep visual tokens in codes."""

    # A hit ends at a block: a block has one format, and its hash covers all of it.
    supports_fine_grained_hash_lookup = False

    kv_cache_spec: MixedPageSpec

    def __init__(self, kv_cache_spec: MixedPageSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        if self.block_pool.num_gpu_blocks > MAX_PAGES:
            raise ValueError(
                f"{self.block_pool.num_gpu_blocks} KV cache pages exceed the {MAX_PAGES} that a "
                "tagged block id can name; lower --kv-cache-memory-bytes"
            )
        if self.block_pool.hash_block_size != self.block_size:
            raise ValueError(
                f"prefix_match_unit {self.block_pool.hash_block_size} differs from the block size "
                f"{self.block_size}, and a visual block cannot be matched in part; leave it unset"
            )
        assert kv_cache_spec.slots <= MAX_SLOTS
        self.requests: Mapping[str, Request] = {}
        """Live requests by id; the scheduler puts its own mapping here."""
        self._spans: dict[str, tuple[int, list[Span]]] = {}
        self._layouts: dict[str, StepLayout] = {}
        self.ledger = VisualPageLedger()

    def spans(self, request_id: str) -> list[Span]:
        """Visual spans of a request; streaming input may add features while it lives."""
        request = self.requests.get(request_id)
        features = request.mm_features if request is not None else []
        known = self._spans.get(request_id)
        if known is None or known[0] != len(features):
            known = (len(features), visual_spans(features, self.kv_cache_spec.modalities))
            self._spans[request_id] = known
        return known[1]

    # What a step takes.

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Pages that the step takes: new ones, and cached ones that it wakes from the free list.

        The admission gate asks with ``apply_admission_cap`` for a whole request, without chunks.
        Its answer assumes that no chunk cuts an image, so it can be short by the partly filled
        pages that cuts leave behind, which preemption makes up for; only the question of a step
        leaves a layout to execute.
        """
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        num_blocks = cdiv(num_tokens, self.block_size) - held
        if num_blocks <= 0:  # most steps of a decode: worth being quick
            return self._get_num_evictable_blocks(new_computed_blocks) if new_computed_blocks else 0
        layout = step_layout(
            self.spans(request_id),
            total_computed_tokens,
            num_tokens_main_model,
            first_block=held,
            num_blocks=num_blocks,
            block_size=self.block_size,
            slots=self.kv_cache_spec.slots,
        )
        if not apply_admission_cap:
            self._layouts[request_id] = layout
        return layout.num_pages + self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Execute the layout that the step was promised."""
        req_blocks = self.req_to_blocks[request_id]
        num_blocks = cdiv(num_tokens, self.block_size) - len(req_blocks)
        if num_blocks <= 0:
            return []
        layout = self._layouts.pop(request_id)
        if layout.first_block != len(req_blocks) or layout.num_blocks != num_blocks:
            raise RuntimeError(
                f"request {request_id}: {layout} does not lead from {len(req_blocks)} blocks to "
                f"{num_tokens} tokens"
            )
        pages = self.block_pool.get_new_blocks(layout.num_pages)
        self.ledger.taken(pages)
        new_blocks: list[Any] = pages
        if layout.pages:
            free = iter(pages)
            visual: dict[int, VisualBlock] = {}
            for page_blocks in layout.pages:
                page = next(free)
                for slot, block in enumerate(page_blocks):
                    visual[block] = VisualBlock(page, slot)
                self.ledger.written(page, len(page_blocks))
                self.ledger.hold([page])
            added = range(layout.first_block, layout.first_block + num_blocks)
            new_blocks = [visual.get(b) or next(free) for b in added]
        req_blocks.extend(new_blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(p.block_id for p in pages)
        return new_blocks

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Give a request the blocks of its prefix hit; a page gets one reference, however many of
        its sub-slots were hit.
        """
        assert num_external_computed_tokens == 0, "KV connectors are refused at start"
        req_blocks = self.req_to_blocks[request_id]
        assert not req_blocks
        if self.enable_caching:
            self.block_pool.touch(distinct_pages(new_computed_blocks))
        req_blocks.extend(new_computed_blocks)
        self.ledger.hold(visual_pages(req_blocks))
        self.num_cached_block[request_id] = len(req_blocks)

    @classmethod
    def _get_num_evictable_blocks(cls, blocks: Sequence[Block]) -> int:
        pages = distinct_pages(blocks)
        return sum(page.ref_cnt == 0 and not page.is_null for page in pages)

    # Prefix cache.

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Put the full blocks of a request into the pool's hash map."""
        done = self.num_cached_block.get(request.request_id, 0)
        full = num_tokens // self.block_size
        if done >= full:
            return
        blocks: list[Any] = self.req_to_blocks[request.request_id][:full]
        for i in range(done, full):
            block = blocks[i]
            if isinstance(block, VisualBlock):
                block.block_hash_num_tokens = (i + 1) * self.block_size
                blocks[i] = HashEntry(block.page, block.slot)
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=blocks,
            num_cached_blocks=done,
            num_full_blocks=full,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = full

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **kwargs: Any) -> tuple[tuple[list, ...], int]:
        """The longest cached prefix, with the hash map's entries turned into visual blocks."""
        groups, num_tokens = super().find_longest_cache_hit(*args, **kwargs)
        block_size = kwargs["kv_cache_spec"].block_size
        for blocks in groups:
            blocks[:] = [
                b.view((i + 1) * block_size) if isinstance(b, HashEntry) else b
                for i, b in enumerate(blocks)
            ]
        return groups, num_tokens

    # Release.

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request and return its pages, each once."""
        self._spans.pop(request_id, None)
        self._layouts.pop(request_id, None)
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        self.ledger.release(visual_pages(blocks))
        return distinct_pages(blocks)
