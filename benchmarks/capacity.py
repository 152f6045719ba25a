"""How many requests are resident in a fixed KV pool: ``python -m benchmarks.capacity``.

Requests of two published shapes are prefilled and decoded to their last token in vLLM's real
``KVCacheManager``, one after the other, until one does not fit.  The same pool, in bytes, serves
16-bit pages (stock vLLM) and mixed pages.  All requests have images of their own, so nothing is
shared.  Counting needs no model and no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_calibquant import plugin
from vllm_calibquant.config import DTYPE_BITS, CalibQuantConfig
from vllm_calibquant.core.layout import clip_chunk
from vllm_calibquant.core.manager import MixedPageManager
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.format import BLOCK_SIZE
from vllm_calibquant.tags import is_visual

CHUNK = 2048
"""Tokens of a prefill chunk at most."""

POOL_GIB = 8
LAYERS, KV_HEADS, HEAD_SIZE = 28, 4, 128
"""A model of 7 billion parameters with grouped-query attention."""

STOCK = "16-bit"


@dataclass(frozen=True)
class Shape:
    """A request of one image; all numbers are tokens."""

    name: str
    before: int
    visual: int
    after: int
    generated: int
    markers: bool
    """Whether the last token before and the first one after the image are markers that belong to
    its placeholder, as ``<img>`` and ``</img>`` of InternVL do; they are text."""

    def request(self, number: int) -> Request:
        """A request that shares nothing with any other."""
        length = self.before + self.visual + self.after
        tokens = [number % 30000 + 1] * length
        mask = torch.ones(self.visual + 2 * self.markers, dtype=torch.bool)
        if self.markers:
            mask[0] = mask[-1] = False
        position = PlaceholderRange(
            offset=self.before - self.markers,
            length=len(mask),
            is_embed=mask if self.markers else None,
        )
        return Request(
            request_id=f"{self.name}-{number}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=self.generated),
            pooling_params=None,
            mm_features=[MultiModalFeatureSpec(None, "image", f"image-{number}", position)],
            cache_salt=str(number),
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        )


SHAPES = (
    Shape("internvl", before=10, visual=3328, after=5, generated=128, markers=True),
    Shape("llava", before=5, visual=576, after=8, generated=128, markers=False),
)


class Residents(NamedTuple):
    """What fitted into a pool."""

    requests: int
    text_pages: int
    """Text pages of one request."""
    visual_pages: int
    """Visual pages of one request."""


def pool_pages() -> int:
    """Pages of the pool: a page holds 16 tokens of one layer, and layers share their ids."""
    page_bytes = 2 * BLOCK_SIZE * KV_HEADS * HEAD_SIZE * 2
    return POOL_GIB * 2**30 // (page_bytes * LAYERS)


def kv_spec(dtype: str) -> FullAttentionSpec:
    """KV cache spec of the layers for :data:`STOCK` or one of our dtypes."""
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16
    )
    if dtype == STOCK:
        return spec
    return MixedPageSpec.of(spec, CalibQuantConfig(bits=DTYPE_BITS[dtype]))


def residents(shape: Shape, dtype: str) -> Residents:
    """Fill the pool with requests that have generated all their tokens.

    Parameters
    ----------
    shape
        The requests.
    dtype
        :data:`STOCK` or one of our KV cache dtypes.
    """
    spec = kv_spec(dtype)
    groups = [KVCacheGroupSpec([f"layer {i}" for i in range(LAYERS)], spec)]
    kv = KVCacheManager(
        # Page 0 is vLLM's null block.
        KVCacheConfig(num_blocks=pool_pages() + 1, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=32768,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    (manager,) = kv.coordinator.single_type_managers
    live: dict[str, Request] = {}
    if isinstance(manager, MixedPageManager):
        manager.requests = live
    for number in count():
        request = shape.request(number)
        live[request.request_id] = request
        if not run(request, kv, spec):
            kv.free(request)
            break
    (ids,) = kv.get_block_ids(f"{shape.name}-0")
    pages = [block.block_id for block in kv.block_pool.blocks if block.ref_cnt]
    text = sum(not is_visual(i) for i in ids)
    visual, rest = divmod(len(pages) - number * text, number)
    if rest:
        raise RuntimeError("requests of one shape take different numbers of pages")
    return Residents(number, text, visual)


def run(request: Request, kv: KVCacheManager, spec: FullAttentionSpec) -> bool:
    """Compute a request up to its last token; False if the pool is full."""
    last = request.num_prompt_tokens + request.max_tokens
    (manager,) = kv.coordinator.single_type_managers
    while True:
        start = request.num_computed_tokens
        tokens = min(CHUNK, request.num_tokens - start)
        if isinstance(spec, MixedPageSpec):
            tokens = clip_chunk(
                manager.spans(request.request_id),
                start,
                tokens,
                block_size=BLOCK_SIZE,
                slots=spec.slots,
            )
        if kv.allocate_slots(request, tokens) is None:
            return False
        request.num_computed_tokens = start + tokens
        if request.num_computed_tokens == request.num_tokens:
            if request.num_tokens == last:
                return True
            request.append_output_token_ids(7)


def bound(shape: Shape, found: Residents) -> str:
    """What takes the larger part of a request's pages."""
    if not found.visual_pages:
        return f"16-bit visual tokens ({shape.visual // BLOCK_SIZE} of the pages)"
    share = found.visual_pages / (found.text_pages + found.visual_pages)
    if share > 0.5:
        return f"visual pages ({share:.0%} of all)"
    return f"text, generated and partly visual blocks ({1 - share:.0%} of all)"


def main() -> None:
    """Print the table."""
    plugin.register()
    init_none_hash(sha256)
    print(
        f"KV pool of {POOL_GIB} GiB = {pool_pages():,} pages of {BLOCK_SIZE} tokens at 16 bits "
        f"({LAYERS} layers, {KV_HEADS} KV heads, head size {HEAD_SIZE}); requests resident after "
        "their last token"
    )
    header = ("request (tokens)", "KV cache", "requests", "ratio", "text pages", "visual pages")
    row = "{:50} {:12} {:>8} {:>6} {:>10} {:>12}  {}"
    print(row.format(*header, "bound by"))
    ratios = {}
    for shape in SHAPES:
        what = (
            f"{shape.name}: {shape.before} text, {shape.visual:,} visual, {shape.after} text, "
            f"{shape.generated} out"
        )
        stock = residents(shape, STOCK)
        for dtype in (STOCK, *DTYPE_BITS):
            found = stock if dtype == STOCK else residents(shape, dtype)
            ratio = found.requests / stock.requests
            ratios[shape.name, dtype] = ratio
            cells = (what, dtype, found.requests, f"{ratio:.2f}")
            cells += (found.text_pages, found.visual_pages or "-", bound(shape, found))
            print(row.format(*cells))
            what = ""
    print("A page of 16 tokens at 16 bits holds 224, 112 or 48 visual tokens at 1, 2 or 4 bits.")
    one_bit = {shape.name: ratios[shape.name, "calibquant1"] for shape in SHAPES}
    print(f"capacity_ratio internvl={one_bit['internvl']:.2f} llava={one_bit['llava']:.2f}")


if __name__ == "__main__":
    main()
