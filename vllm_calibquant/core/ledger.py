"""What the visual pages of a pool hold, for metrics and for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from vllm.v1.core.kv_cache_utils import KVCacheBlock


class VisualPageLedger:
    """Holders and filled sub-slots of visual pages.

    A page is *held* while a request refers to it, and *known* until it is taken for something else:
    a page in the prefix cache that nobody holds can be held again by a hit.
    """

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._holders: Counter[int] = Counter()
        self.held_slots = 0
        """Filled sub-slots of all held pages."""

    @property
    def held_pages(self) -> int:
        """Visual pages that at least one request refers to."""
        return len(self._holders)

    def written(self, page: KVCacheBlock, slots: int) -> None:
        """Note a fresh visual page with so many filled sub-slots."""
        self._slots[page.block_id] = slots

    def taken(self, pages: Iterable[KVCacheBlock]) -> None:
        """Note that pages left the free list and lost what they held."""
        if self._slots:
            for page in pages:
                self._slots.pop(page.block_id, None)

    def hold(self, pages: Iterable[KVCacheBlock]) -> None:
        """Note that one more request refers to these visual pages."""
        for page in pages:
            if self._holders[page.block_id] == 0:
                self.held_slots += self._slots[page.block_id]
            self._holders[page.block_id] += 1

    def release(self, pages: Iterable[KVCacheBlock]) -> None:
        """Note that one request less refers to these visual pages."""
        for page in pages:
            self._holders[page.block_id] -= 1
            if self._holders[page.block_id] == 0:
                del self._holders[page.block_id]
                self.held_slots -= self._slots[page.block_id]
