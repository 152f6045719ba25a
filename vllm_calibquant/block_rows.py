"""What the host of a GPU worker knows of its block table: which requests need our kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_calibquant.tags import is_visual, page_of


class BlockRows:
    """Formats of the blocks in the rows of a worker's block table, one row for each request."""

    def __init__(self) -> None:
        self._visual: set[int] = set()
        self._recycled: set[int] = set()
        self._code_pages: set[int] = set()

    def append(self, row: int, groups: Iterable[Sequence[int]], overwrite: bool) -> None:
        """Note that a row gets more tagged block ids, of each KV cache group, or a new request."""
        if overwrite:
            self._visual.discard(row)
            self._recycled.discard(row)
        for ids in groups:
            if not ids:
                continue
            if is_visual(max(ids)):
                self._visual.add(row)
                self._code_pages.update(page_of(i) for i in ids if is_visual(i))
            if self._code_pages and not self._code_pages.isdisjoint(ids):
                self._code_pages.difference_update(ids)
                self._recycled.add(row)

    def any_visual(self, rows: Sequence[int]) -> bool:
        """Whether a request in one of these rows has a visual block."""
        return bool(self._visual) and not self._visual.isdisjoint(rows)

    def any_recycled(self, rows: Sequence[int]) -> bool:
        """Whether one of these rows has a text block in a page that held codes before.

        Codes can read as NaN, and attention computes ``0 * NaN`` past a sequence's end: whoever
        writes such a block for the first time must clear the rest of it.
        """
        return bool(self._recycled) and not self._recycled.isdisjoint(rows)


BLOCK_ROWS = BlockRows()
"""Of this process, which has one worker."""
