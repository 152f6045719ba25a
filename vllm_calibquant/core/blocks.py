"""Two small views that let vLLM's own block pool own visual pages.

A visual page is an ordinary :class:`KVCacheBlock` of the pool.  What a request holds of it is a
:class:`VisualBlock` (page, sub-slot); what the prefix cache holds is a :class:`HashEntry`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from vllm_calibquant.tags import tag


@dataclass(eq=False, slots=True)
class VisualBlock:
    """One sub-slot of a visual page, as an entry of a request's block list.

    It answers what vLLM reads of a block.  What vLLM would *write* is read-only, so that code which
    would change the state of a page through one of its sub-slots raises instead.
    """

    page: KVCacheBlock
    slot: int
    block_hash_num_tokens: int | None = None
    """Prefix tokens up to the end of this block, once it is in the prefix cache."""

    is_null = False

    @property
    def block_id(self) -> int:
        """Tagged id."""
        return tag(self.page.block_id, self.slot)

    @property
    def ref_cnt(self) -> int:
        """References to the page."""
        return self.page.ref_cnt

    @property
    def pool(self) -> BlockPool | None:
        """Pool of the page."""
        return self.page.pool

    @property
    def block_hash(self) -> BlockHashWithGroupId | None:
        """A hash of the page, which serves to see whether it is in the prefix cache."""
        return self.page.block_hash


class HashEntry(KVCacheBlock):
    """What the pool's hash map holds for a full visual block.

    It has the id of the page, so that evicting the page finds it.  A page has as many hashes as it
    has cached sub-slots: the first goes to the page itself and the others to the pool's
    ``cached_block_hashes_by_block``, where eviction looks for them.
    """

    __slots__ = ("page", "slot")

    def __init__(self, page: KVCacheBlock, slot: int) -> None:
        super().__init__(page.block_id, pool=page.pool)
        self.page = page
        self.slot = slot

    def set_block_hash(
        self, block_hash: BlockHashWithGroupId, num_tokens: int | None = None
    ) -> None:
        """Record the hash with the page; the entry itself keeps none."""
        if self.page.block_hash is None:
            self.page.set_block_hash(block_hash, num_tokens)
        else:
            assert self.pool is not None
            hashes = self.pool.cached_block_hashes_by_block
            hashes.setdefault(self.block_id, set()).add(block_hash)

    def view(self, num_tokens: int) -> VisualBlock:
        """The sub-slot as an entry of a request's block list."""
        return VisualBlock(self.page, self.slot, num_tokens)


Block: TypeAlias = KVCacheBlock | VisualBlock


def distinct_pages(blocks: Iterable[Block]) -> list[KVCacheBlock]:
    """Pages of a request's blocks, each once, in order of their first block."""
    pages: dict[int, KVCacheBlock] = {}
    last = None
    for block in blocks:
        page = block.page if isinstance(block, VisualBlock) else block
        if page is not last:  # neighbours share a page
            pages[id(page)] = last = page
    return list(pages.values())


def visual_pages(blocks: Iterable[Block]) -> list[KVCacheBlock]:
    """Visual pages among a request's blocks, each once, in order of their first block."""
    return distinct_pages(b for b in blocks if isinstance(b, VisualBlock))
