"""The line that tells the operator at start what the pool holds."""

from __future__ import annotations

from pathlib import Path

from vllm_calibquant.core.layout import prompt_pages
from vllm_calibquant.core.spans import Span
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.profile import Profile

TYPICAL_VISUAL = 1024
TYPICAL_TEXT = 256
"""Tokens of the request that the line counts: an image first, then question and answer."""


def capacity_line(cache_dtype: str, spec: MixedPageSpec, num_pages: int, num_layers: int) -> str:
    """What a pool holds, beside the same pool with every token at the model's precision.

    Parameters
    ----------
    cache_dtype
        Our KV cache dtype.
    spec
        KV cache spec of the layers.
    num_pages
        Pages that requests can take.
    num_layers
        Layers that share a page of the pool.
    """
    text_tokens = num_pages * spec.block_size
    visual_tokens = text_tokens * spec.slots
    stock = num_pages // -(-(TYPICAL_TEXT + TYPICAL_VISUAL) // spec.block_size)
    image, tokens = Span(16, 16 + TYPICAL_VISUAL), TYPICAL_VISUAL + TYPICAL_TEXT
    mixed = num_pages // prompt_pages(
        [image], tokens, tokens, block_size=spec.block_size, slots=spec.slots
    )
    precision = str(spec.dtype).removeprefix("torch.")
    mib = num_pages * num_layers * spec.page_size_bytes / 2**20
    return (
        f"{cache_dtype}: {num_pages:,} KV pages ({mib:,.0f} MiB) hold {text_tokens:,} text tokens "
        f"in {precision}, or {visual_tokens:,} visual tokens in codes ({spec.slots}x), or "
        f"{mixed:,} requests of {TYPICAL_VISUAL:,} visual and {TYPICAL_TEXT} text tokens; "
        f"{precision} pages alone would hold {stock:,}"
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
