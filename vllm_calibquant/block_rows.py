"""What the host of a GPU worker knows of its block table: which requests need our kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm_calibquant.tags import is_visual, page_of


class BlockRows:
    """Formats of the blocks in the rows of a worker's block table, one row for each request."""

    def __init__(self) -> None:
        self._lengths: dict[int, list[int]] = {}
        self._visual_begins: dict[int, int] = {}
        self._visual_ends: dict[int, int] = {}
        self._recycled: set[int] = set()
        self._code_pages: set[int] = set()

    def append(self, row: int, groups: Iterable[Sequence[int]], overwrite: bool) -> None:
        """Note that a row gets more tagged block ids, of each KV cache group, or a new request."""
        if overwrite:
            self._lengths.pop(row, None)
            self._visual_begins.pop(row, None)
            self._visual_ends.pop(row, None)
            self._recycled.discard(row)
        lengths = self._lengths.setdefault(row, [])
        for group, ids in enumerate(groups):
            if group == len(lengths):
                lengths.append(0)
            if not ids:
                continue
            before = lengths[group]
            lengths[group] += len(ids)
            if is_visual(max(ids)):
                first = before + next(i for i, block in enumerate(ids) if is_visual(block))
                self._visual_begins[row] = min(self._visual_begins.get(row, first), first)
                after = next(i for i, block in enumerate(reversed(ids)) if is_visual(block))
                self._visual_ends[row] = max(self.visual_end(row), lengths[group] - after)
                self._code_pages.update(page_of(i) for i in ids if is_visual(i))
            if self._code_pages and not self._code_pages.isdisjoint(ids):
                self._code_pages.difference_update(ids)
                self._recycled.add(row)

    def any_visual(self, rows: Sequence[int]) -> bool:
        """Whether a request in one of these rows has a visual block."""
        return bool(self._visual_ends) and not self._visual_ends.keys().isdisjoint(rows)

    def visual_begin(self, row: int) -> int:
        """Blocks of the request in a row before its first visual one; 0 if it has none."""
        return self._visual_begins.get(row, 0)

    def visual_end(self, row: int) -> int:
        """Blocks of the request in a row up to its last visual one; 0 if it has none."""
        return self._visual_ends.get(row, 0)

    def any_recycled(self, rows: Sequence[int]) -> bool:
        """Whether one of these rows has a text block in a page that held codes before.

        Codes can read as NaN, and attention computes ``0 * NaN`` past a sequence's end: whoever
        writes such a block for the first time must clear the rest of it.
        """
        return bool(self._recycled) and not self._recycled.isdisjoint(rows)


BLOCK_ROWS = BlockRows()
"""Of this process, which has one worker."""
