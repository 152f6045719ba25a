"""Spans and layouts against brute force over single positions."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from tests.core.harness import BLOCK, Media, Text, make_request, mixed_spec, plain_spec
from vllm_calibquant.core.layout import clip_chunk, prompt_pages, step_layout, visual_blocks
from vllm_calibquant.core.report import capacity_line
from vllm_calibquant.core.spans import Span, visual_spans

slots = st.sampled_from([14, 7, 3])


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    """Spans in order, with at least one token between two of them."""
    spans, at = [], 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(1, 50), st.integers(1, 600)), min_size=1, max_size=4)
    ):
        spans.append(Span(at + gap, at + gap + length))
        at += gap + length
    first = spans[0]
    return [Span(first.start - draw(st.sampled_from([0, first.start])), first.end), *spans[1:]]


def visual_positions(spans: list[Span]) -> set[int]:
    return {t for span in spans for t in range(span.start, span.end)}


def whole_blocks(spans: list[Span], start: int, end: int) -> list[int]:
    """Blocks whose 16 positions are all visual and all in the step."""
    visual = visual_positions(spans)
    return [
        block
        for block in range(end // BLOCK + 1)
        if all(start <= t < end and t in visual for t in range(block * BLOCK, (block + 1) * BLOCK))
    ]


@settings(max_examples=200, deadline=None)
@given(spans=span_lists(), start=st.integers(0, 900), length=st.integers(1, 900))
def test_visual_blocks(spans, start, length):
    expected = whole_blocks(spans, start, start + length)
    assert visual_blocks(spans, start, start + length, BLOCK) == expected


@settings(max_examples=200, deadline=None)
@given(
    spans=span_lists(),
    start=st.integers(0, 900),
    length=st.integers(1, 900),
    lookahead=st.integers(0, 40),
    extra=st.integers(0, 3),
    slots=slots,
)
def test_layout_of_a_step(spans, start, length, lookahead, extra, slots):
    end = start + length
    first = -(-start // BLOCK) + extra  # an earlier lookahead may have added blocks already
    count = max(-(-(end + lookahead) // BLOCK) - first, 0)
    layout = step_layout(spans, start, end, first, count, block_size=BLOCK, slots=slots)
    assert (layout.first_block, layout.num_blocks) == (first, count)

    in_pages = [block for page in layout.pages for block in page]
    assert in_pages == sorted(set(in_pages))
    allowed = [b for b in whole_blocks(spans, start, end) if first <= b < first + count]
    # One block may be left over: alone in its page it would save nothing.
    assert in_pages == allowed[: len(in_pages)]
    assert len(allowed) - len(in_pages) == (len(allowed) % slots == 1)
    assert all(2 <= len(page) <= slots for page in layout.pages)
    assert all(len(page) == slots for page in layout.pages[:-1])
    assert layout.num_pages == count - len(in_pages) + len(layout.pages)


def chunked(
    spans: list[Span], end: int, chunk: int, slots: int, clip: bool, start: int = 0
) -> tuple[int, int]:
    """Pages and steps of a prompt computed in chunks, from a block boundary on."""
    pages, steps, blocks = 0, 0, start // BLOCK
    while start < end:
        tokens = min(chunk, end - start)
        if clip:
            tokens = clip_chunk(spans, start, tokens, block_size=BLOCK, slots=slots)
        count = -(-(start + tokens) // BLOCK) - blocks
        layout = step_layout(
            spans, start, start + tokens, blocks, count, block_size=BLOCK, slots=slots
        )
        pages += layout.num_pages
        blocks += count
        start += tokens
        steps += 1
    return pages, steps


@settings(max_examples=300, deadline=None)
@given(spans=span_lists(), start=st.integers(0, 2000), length=st.integers(1, 900), slots=slots)
def test_a_clipped_chunk_ends_at_a_page(spans, start, length, slots):
    tokens = clip_chunk(spans, start, length, block_size=BLOCK, slots=slots)
    assert 1 <= tokens <= length
    end = start + length
    visual = visual_positions(spans)
    cuts = end in visual and end - 1 in visual
    stored = whole_blocks(spans, start, end)
    if tokens == length:
        return
    assert cuts, "a chunk was shortened that cuts no span"
    assert (start + tokens) % BLOCK == 0
    left = whole_blocks(spans, start, start + tokens)
    if len(left) % slots == 0:
        return  # full pages only
    # Otherwise the cut span was left to the next chunk, or there was no room for a full page and
    # nothing but the cut block was given up.
    cut = next(span for span in spans if span.start < end < span.end)
    untouched = not any(block * BLOCK >= cut.start for block in left)
    assert untouched or left == stored
    assert untouched or len([b for b in stored if b * BLOCK >= cut.start]) < slots


@settings(max_examples=200, deadline=None)
@given(spans=span_lists(), chunk=st.integers(1, 700), slots=slots)
def test_chunks_make_progress(spans, chunk, slots):
    """Clipping costs at most a few more steps."""
    end = spans[-1].end + 20
    _, plain_steps = chunked(spans, end, chunk, slots, clip=False)
    _, steps = chunked(spans, end, chunk, slots, clip=True)
    assert plain_steps <= steps <= 2 * plain_steps + 2 * len(spans)


@pytest.mark.parametrize(
    ("chunk", "unclipped", "clipped"),
    [(100, 69, 45), (256, 36, 25), (512, 30, 25), (2048, 26, 25), (8192, 25, 25)],
)
def test_clipping_saves_pages(chunk, unclipped, clipped):
    """An image of 3,328 tokens in a prompt of 3,343, and 128 tokens of answer."""
    spans = [Span(10, 3338)]
    answer = -(-(3343 + 128) // BLOCK) - -(-3343 // BLOCK)
    assert chunked(spans, 3343, chunk, 14, clip=False)[0] + answer == unclipped
    assert chunked(spans, 3343, chunk, 14, clip=True)[0] + answer == clipped


# Spans of a request.


@settings(max_examples=100, deadline=None)
@given(
    segments=st.lists(
        st.one_of(
            st.builds(Text.of, st.integers(1, 30), st.just(0)),
            st.builds(
                Media,
                st.integers(1, 100),
                st.integers(0, 2),
                st.sampled_from(["bare", "wrapped", "rows"]),
                st.sampled_from(["image", "video", "audio"]),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    modalities=st.sampled_from([("image", "video"), ("image",), ("video",)]),
)
def test_spans_of_a_request(segments, modalities):
    visual, at = set(), 0
    for segment in segments:
        mask = [False] * len(segment.tokens) if isinstance(segment, Text) else segment.mask
        if isinstance(segment, Media) and segment.modality in modalities:
            visual |= {at + i for i, is_embed in enumerate(mask) if is_embed}
        at += len(mask)
    request = make_request("r", segments)
    spans = visual_spans(request.mm_features, modalities)
    assert visual_positions(spans) == visual
    assert spans == sorted(spans)
    # Maximal runs: neighbours are joined, nothing is empty.
    assert all(a.end < b.start for a, b in pairwise(spans))
    assert all(span.start < span.end for span in spans)


def test_markers_and_separators_are_text():
    position = PlaceholderRange(
        offset=5, length=8, is_embed=torch.tensor([0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    )
    feature = MultiModalFeatureSpec(None, "image", "a", position)
    assert visual_spans([feature], ["image"]) == [Span(6, 8), Span(9, 12)]
    assert visual_spans([feature], ["video"]) == []


# What the operator is told.


def test_pages_of_the_two_requests_of_the_issue():
    # 10 text, 3328 visual, 5 text, 128 generated: 207 visual blocks in 15 pages, 10 text blocks.
    assert prompt_pages([Span(10, 3338)], 3471, 3471, block_size=BLOCK, slots=14) == 25
    # 5, 576, 8, 128: 35 visual blocks in 3 pages, 10 text blocks.
    assert prompt_pages([Span(5, 581)], 717, 717, block_size=BLOCK, slots=14) == 13


def test_capacity_line():
    line = capacity_line("calibquant1", [mixed_spec(1)], 1000, 28 * 16384)
    assert "1,000 KV pages" in line
    assert "16,000 text tokens in bfloat16" in line
    assert "224,000 visual tokens in codes (14x)" in line
    # 1280 tokens: 80 pages at 16 bits; 64 visual blocks in 5 pages and 16 text blocks otherwise.
    assert "or 47 requests of 1,024 visual and 256 text tokens" in line
    assert line.endswith("bfloat16 pages alone would hold 12")
    assert "(438 MiB)" in line  # 1000 pages x 28 layers x 16 KiB


def test_capacity_line_with_a_layer_at_16_bits():
    """One of six makes six groups, each of which has every token."""
    line = capacity_line("calibquant1", [plain_spec(), *[mixed_spec(1)] * 5], 599, 16384)
    assert "599 KV pages (9 MiB) hold 1,584 text tokens" in line
    assert "7,003 visual tokens in codes (4.42x)" in line
    # 80 pages a group at 16 bits, 21 in codes.
    assert "or 3 requests" in line
    assert line.endswith("bfloat16 pages alone would hold 1")
