"""The line that tells the operator at start what the pool holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_calibquant.core.layout import prompt_pages
from vllm_calibquant.core.spans import Span
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.profile import Profile

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

TYPICAL_VISUAL = 1024
TYPICAL_TEXT = 256
"""Tokens of the request that the line counts: an image first, then question and answer."""


def capacity_line(
    cache_dtype: str, specs: Sequence[AttentionSpec], num_pages: int, page_bytes: float
) -> str:
    """What a pool holds, beside the same pool with every token at the model's precision.

    Parameters
    ----------
    cache_dtype
        Our KV cache dtype.
    specs
        KV cache specs of the groups, each of which holds every token, for layers of its own.
    num_pages
        Pages that requests can take.
    page_bytes
        Bytes of a page of the pool in a worker, those of its layers together.
    """
    mixed = [spec for spec in specs if isinstance(spec, MixedPageSpec)]
    block_size, precision = mixed[0].block_size, str(mixed[0].dtype).removeprefix("torch.")
    slots = [spec.slots if isinstance(spec, MixedPageSpec) else 1 for spec in specs]
    text_tokens = num_pages // len(slots) * block_size
    times = len(slots) / sum(1 / n for n in slots)
    image, tokens = Span(16, 16 + TYPICAL_VISUAL), TYPICAL_VISUAL + TYPICAL_TEXT

    def requests(slots: Sequence[int]) -> int:
        pages = (
            prompt_pages([image] if n > 1 else [], tokens, tokens, block_size=block_size, slots=n)
            for n in slots
        )
        return num_pages // sum(pages)

    return (
        f"{cache_dtype}: {num_pages:,} KV pages ({num_pages * page_bytes / 2**20:,.0f} MiB) hold "
        f"{text_tokens:,} text tokens in {precision}, or {text_tokens * times:,.0f} visual tokens "
        f"in codes ({times:.3g}x), or {requests(slots):,} requests of {TYPICAL_VISUAL:,} visual "
        f"and {TYPICAL_TEXT} text tokens; {precision} pages alone would hold "
        f"{requests([1] * len(slots)):,}"
    )


def profile_line(profile: Profile, path: str, model: str) -> str:
    """Where a profile comes from, and a hint if it was made for a model of another name.

    Models of one shape may differ in their weights, which a profile does not know.

    Parameters
    ----------
    profile
        It.
    path
        Its file.
    model
        Name or directory of the model that is served.
    """
    notes, name = profile.notes, Path(model).name
    bits = profile.average_bits
    line = f"profile {path}: {bits:g} bit{'s' * (bits != 1)} a number"
    if "model" in notes:
        line += f", made for {notes['model']} from {notes['prompts']:,} prompts"
    if notes.get("model", name) != name:
        line += f"; {name} has the same shape, but if its weights differ, make a profile of its own"
    return line
