"""From a request to the runs of prompt positions that hold embedded visual tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


class Span(NamedTuple):
    """Positions ``start <= t < end`` of a prompt, all of them embedded visual tokens."""

    start: int
    end: int


def visual_spans(
    features: Iterable[MultiModalFeatureSpec], modalities: Collection[str]
) -> list[Span]:
    """Spans of a request, in order.

    Marker and separator tokens inside a placeholder get no embedding and are text.  Adjacent spans
    (two images with nothing in between) are joined, since a page does not care whose tokens it has.
    """
    spans: list[Span] = []
    for feature in features:
        if feature.modality not in modalities:
            continue
        for start, last in feature.mm_position.extract_embeds_range():
            if spans and spans[-1].end == start:
                spans[-1] = Span(spans[-1].start, last + 1)
            else:
                spans.append(Span(start, last + 1))
    return spans
