"""Tagged block ids: the one integer that tells the worker where a block is and in which format.

A text block keeps its page id ``p``. Sub-slot ``s`` of visual page ``p`` is ``p + ((1 + s) <<
23)``. With fewer than 2**23 pages and at most 15 sub-slots, ``id * 16 + offset``, which is how vLLM
forms a slot, stays inside int32, and decoding is a shift and a mask. Nothing else tells formats
apart.

Every function takes ints and integer tensors alike.
"""

from __future__ import annotations

from typing import TypeVar

import torch

TAG_SHIFT = 23
"""Bits of a tagged block id that name the page; the bits above are 1 + sub-slot (0 for text)."""
MAX_PAGES = 1 << TAG_SHIFT
PAGE_MASK = MAX_PAGES - 1

Ids = TypeVar("Ids", int, torch.Tensor)


def tag(page: Ids, slot: Ids) -> Ids:
    """Tagged id of sub-slot ``slot`` (0-based) of visual page ``page``."""
    return page + ((slot + 1) << TAG_SHIFT)


def page_of(block_id: Ids) -> Ids:
    """Page of a text or visual block."""
    return block_id & PAGE_MASK


def slot_of(block_id: Ids) -> Ids:
    """Sub-slot of a visual block; -1 for a text block."""
    return (block_id >> TAG_SHIFT) - 1


def is_visual(block_id: Ids) -> Ids:
    """Whether a block is in visual format."""
    return block_id >= MAX_PAGES  # type: ignore[return-value]
