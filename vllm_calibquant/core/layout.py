"""Which blocks of a step are visual, and which of them share a page.

Pure functions over positions; the manager turns their answer into pages of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm_calibquant.core.spans import Span


def visual_blocks(spans: Sequence[Span], start: int, end: int, block_size: int) -> list[int]:
    """Logical blocks of a step that can be stored in visual format.

    Parameters
    ----------
    spans
        Visual spans of the request, in order.
    start, end
        The step computes positions ``start <= t < end``.
    block_size
        Tokens of a block.

    Returns
    -------
    list[int]
        Indices of the blocks that lie inside the step and inside one span, in order.
    """
    blocks: list[int] = []
    for span in spans:
        blocks.extend(_blocks_of(span, start, end, block_size))
    return blocks


def _blocks_of(span: Span, start: int, end: int, block_size: int) -> range:
    """Blocks of a step that lie inside one span."""
    return range(-(-max(span.start, start) // block_size), min(span.end, end) // block_size)


class StepLayout(NamedTuple):
    """How the new blocks of one step are stored."""

    first_block: int
    """First logical block that the step adds."""

    num_blocks: int
    """Logical blocks that the step adds."""

    pages: tuple[tuple[int, ...], ...]
    """For each visual page, its logical blocks in sub-slot order; all other blocks are text."""

    @property
    def num_pages(self) -> int:
        """Pages of the pool that the step takes, text and visual."""
        return self.num_blocks - sum(len(p) for p in self.pages) + len(self.pages)


def step_layout(
    spans: Sequence[Span],
    start: int,
    end: int,
    first_block: int,
    num_blocks: int,
    *,
    block_size: int,
    slots: int,
) -> StepLayout:
    """Lay out the blocks that a step adds to a request.

    The visual blocks fill fresh pages of ``slots`` sub-slots in order, across spans, and the last
    page is closed even if it is not full: its scales come from this step alone.  A page that would
    hold a single block is a text block instead, which costs the same and is exact.

    Parameters
    ----------
    spans
        Visual spans of the request, in order.
    start, end
        The step computes positions ``start <= t < end``.
    first_block, num_blocks
        The logical blocks that the step adds.  A block that exists already, or that reaches past
        ``end`` (lookahead), is never visual.
    block_size, slots
        Tokens of a block, sub-slots of a page.
    """
    last_block = first_block + num_blocks
    blocks = [
        b for b in visual_blocks(spans, start, end, block_size) if first_block <= b < last_block
    ]
    pages = tuple(tuple(blocks[i : i + slots]) for i in range(0, len(blocks), slots))
    return StepLayout(first_block, num_blocks, tuple(p for p in pages if len(p) > 1))


def clip_chunk(
    spans: Sequence[Span], start: int, num_tokens: int, *, block_size: int, slots: int
) -> int:
    """Shorten a chunk that cuts a span, so that what it stores of the span fills whole pages.

    Parameters
    ----------
    spans
        Visual spans of the request, in order.
    start, num_tokens
        The chunk computes positions ``start <= t < start + num_tokens``.
    block_size, slots
        Tokens of a block, sub-slots of a page.

    Returns
    -------
    int
        Tokens to compute, at least 1 and at most ``num_tokens``.  The chunk is left alone when it
        cuts no span, and is cut to whole blocks when it has no room for a page.
    """
    end = start + num_tokens
    cut = next((span for span in spans if span.start < end < span.end), None)
    if cut is None:
        return num_tokens
    before = sum(
        len(_blocks_of(span, start, end, block_size)) for span in spans if span.end <= cut.start
    )
    in_cut = _blocks_of(cut, start, end, block_size)
    if not in_cut:
        return num_tokens
    # Of the blocks that fill whole pages, those in the span.
    whole = before + len(in_cut)
    whole -= whole % slots + before
    if whole > 0:
        clipped = (in_cut[0] + whole) * block_size
    elif in_cut[0] * block_size > start:
        clipped = in_cut[0] * block_size  # leave the span to the next chunk
    else:
        clipped = end // block_size * block_size  # no room for a page: cut no block at least
    return clipped - start if clipped > start else num_tokens


def prompt_pages(
    spans: Sequence[Span],
    num_tokens: int,
    chunk: int,
    *,
    block_size: int,
    slots: int,
    cut: Callable[[int, int], int] = lambda start, end: end,
) -> int:
    """Pages of tokens that are computed from the first one on, alone, in chunks.

    Parameters
    ----------
    spans
        Visual spans of the request, in order.
    num_tokens
        Tokens to compute.
    chunk
        Tokens of a step at most.
    block_size, slots
        Tokens of a block, sub-slots of a page.
    cut
        From a chunk's begin and its end to where it ends for other reasons, behind its begin.
    """
    pages = start = blocks = 0
    while spans and start < min(num_tokens, spans[-1].end):
        step = min(chunk, num_tokens - start)
        end = start + clip_chunk(spans, start, step, block_size=block_size, slots=slots)
        end = cut(start, end)
        new = -(-end // block_size) - blocks
        layout = step_layout(spans, start, end, blocks, new, block_size=block_size, slots=slots)
        pages, blocks, start = pages + layout.num_pages, blocks + new, end
    return pages + -(-num_tokens // block_size) - blocks
