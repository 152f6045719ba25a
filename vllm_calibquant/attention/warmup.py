"""Compile at start every kernel that a CUDA server can need, by serving steps that hold nothing.

Kernels compile when they are first launched, which would stall the first request with an image, or
with a prefix hit, for seconds.  What they are specialised by are a few choices of their launchers,
which depend on how many requests and tokens a step has; :func:`step_shapes` has a step for each.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_calibquant.format import BLOCK_SIZE

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

    from vllm_calibquant.attention.cuda import MixedCUDAImpl, MixedCUDAMetadataBuilder

logger = init_logger("vllm.calibquant")  # under vLLM's logger, which is the one with a handler

FEW, MANY = 16, 2048
"""Requests, and tokens, of a step that is large enough for every choice by size."""


class StepShape(NamedTuple):
    """A step whose requests have some cached text."""

    decodes: int
    """Requests with one new token."""
    prefills: tuple[int, ...] = ()
    """New tokens of each other request."""
    only_text: bool = False
    """Whether all new tokens are text, and cached ones may be visual."""
    behind_text: bool = False
    """Whether all cached tokens are known to be text."""


def step_shapes(max_num_reqs: int, max_num_tokens: int) -> list[StepShape]:
    """Steps that make every choice of a launcher; small limits make some of them alike.

    Parameters
    ----------
    max_num_reqs, max_num_tokens
        Most requests and tokens of a step.
    """
    most = max(min(max_num_reqs, max_num_tokens // 2), 1)  # with more than one new token each
    few, tokens = min(most, FEW), min(MANY, max_num_tokens)
    decodes = min(max_num_reqs, max_num_tokens)
    shapes = [
        StepShape(1),
        # Of many requests, few items are merged for each.
        StepShape(decodes),
        # Programs for one request are few, so its pages are shared among several.
        StepShape(0, (2,), only_text=True),
        StepShape(0, (tokens,), only_text=True),
        StepShape(0, (min(64, tokens),)),
        StepShape(0, (min(64, tokens),), behind_text=True),
        # With many requests they are not.
        StepShape(0, (2,) * most),
        StepShape(0, (tokens - 2 * (few - 1), *(2,) * (few - 1))),
    ]
    return [s for s in shapes if sum(s.prefills) <= max_num_tokens]


def warm_up(
    builder: MixedCUDAMetadataBuilder, layers: dict[str, Attention], *, images: bool
) -> None:
    """Serve one step of every shape, and say how long that took.

    Parameters
    ----------
    builder
        Builder of the layers' metadata, complete.
    layers
        The builder's layers by name.
    images
        Whether a request can have visual tokens; without them only decodes run our kernels.
    """
    begin = time.perf_counter()
    scheduler = builder.vllm_config.scheduler_config
    # One layer of each page format; the others launch the same kernels.
    different = {layer.impl.codec.page_format: layer for layer in layers.values()}
    for shape in step_shapes(scheduler.max_num_seqs, scheduler.max_num_batched_tokens):
        if images or not shape.prefills:
            serve_empty_step(builder, list(different.values()), shape)
    torch.cuda.synchronize(builder.device)
    logger.info_once(
        "Compiled the kernels of %s in %.1f s.",
        builder.cache_config.cache_dtype,
        time.perf_counter() - begin,
    )


@torch.inference_mode()
def serve_empty_step(
    builder: MixedCUDAMetadataBuilder, layers: list[Attention], shape: StepShape
) -> None:
    """Let layers write nothing, and attend to one block of zeros."""
    impl: MixedCUDAImpl = layers[0].impl
    device, dtype = builder.device, builder.kv_cache_spec.dtype
    new = [1] * shape.decodes + [*shape.prefills]
    lengths = torch.tensor(new, dtype=torch.int32) + BLOCK_SIZE
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, blocks = int(starts[-1]), -(-int(lengths.max()) // BLOCK_SIZE)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(new),
        num_actual_tokens=tokens,
        max_query_len=max(new),
        max_seq_len=int(lengths.max()),
        block_table_tensor=torch.zeros(len(new), blocks, dtype=torch.int32, device=device),
        slot_mapping=torch.full((tokens,), -1, device=device),
    )
    heads = (impl.num_heads, impl.num_kv_heads, impl.num_kv_heads)
    query, key, value = torch.zeros(
        tokens, sum(heads), impl.head_size, dtype=dtype, device=device
    ).split(heads, dim=1)
    pages = (1, impl.num_kv_heads, BLOCK_SIZE, 2 * impl.head_size)
    kv_cache = torch.zeros(pages, dtype=dtype, device=device)
    spans = [range(BLOCK_SIZE, int(n)) for n in lengths] if shape.behind_text else None
    metadata = builder._build(
        common, fast_build=False, visual=True, spans=spans, codes=not shape.only_text
    )
    for layer in layers:
        output = query.new_empty(query.shape)
        layer.impl.forward(layer, query, key, value, kv_cache, metadata, output)
