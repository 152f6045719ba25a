"""How long a request may be: a pool holds many times more visual tokens than text tokens.

vLLM refuses to start where a request of ``max_model_len`` tokens would not fit into the pool at 16
bits.  With mixed pages that says little, so the start asks for room in codes alone (the spec's
``max_memory_usage_bytes``), and each request is looked at when it comes: the API server answers one
that can never fit with a client error, and the scheduler ends a request where the pool ends, as it
would end at ``max_model_len``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm_calibquant.config import bits_of, load_config
from vllm_calibquant.core.layout import prompt_pages
from vllm_calibquant.core.spans import Span, visual_spans

if TYPE_CHECKING:
    from vllm.config import CacheConfig, SchedulerConfig, VllmConfig

    from vllm_calibquant.core.spec import MixedPageSpec


def chunk_tokens(scheduler: SchedulerConfig) -> int:
    """Most tokens of a request that one step computes."""
    return scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens


def too_long(num_tokens: int, spans: Sequence[Span], needed: int, pages: int) -> str:
    """The sentence that tells a client why a prompt cannot be served."""
    visual = sum(span.end - span.start for span in spans)
    return (
        f"The prompt has {num_tokens:,} tokens, {visual:,} of them of images or videos, and takes "
        f"{needed:,} pages of the KV cache, which has {pages:,}. Shorten the prompt, or serve with "
        "more KV cache memory."
    )


@dataclass
class FrontEndLimit:
    """What the API server knows of an engine's pool."""

    cache: CacheConfig
    """vLLM puts the number of pages here when the engine has started."""
    chunk: int
    spec: MixedPageSpec

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> FrontEndLimit | None:
        """That of a finished configuration; None if the engine alone can tell."""
        cache, model = vllm_config.cache_config, vllm_config.model_config
        # Where some layers keep 16 bits there are more groups, which only the engine knows.
        if bits_of(cache.cache_dtype) is None or cache.kv_cache_dtype_skip_layers:
            return None
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from vllm_calibquant.core.spec import MixedPageSpec

        plain = FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=model.get_num_kv_heads(vllm_config.parallel_config),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        config = load_config(cache.cache_dtype, vllm_config.additional_config)
        chunk = chunk_tokens(vllm_config.scheduler_config)
        return cls(cache, chunk, MixedPageSpec.of(plain, config))

    def check(self, engine_input: Mapping[str, Any]) -> None:
        """Refuse a prompt that cannot ever fit.

        Raises
        ------
        VLLMValidationError
            Which the API server answers with status 400.
        """
        from vllm.exceptions import VLLMValidationError

        tokens = engine_input.get("prompt_token_ids")
        if tokens is None or not self.cache.num_gpu_blocks:
            return
        # With data parallelism this is the sum over all engines; then the engine itself refuses.
        pages = self.cache.num_gpu_blocks - 1
        if len(tokens) <= pages * self.spec.block_size:
            return  # would fit as text
        placeholders = engine_input.get("mm_placeholders") or {}
        spans = visual_spans(
            sorted(
                chain.from_iterable(
                    (_Feature(modality, position) for position in positions)
                    for modality, positions in placeholders.items()
                ),
                key=lambda feature: feature.mm_position.offset,
            ),
            self.spec.modalities,
        )
        needed = prompt_pages(
            spans,
            len(tokens),
            self.chunk,
            block_size=self.spec.block_size,
            slots=self.spec.slots,
        )
        if needed > pages:
            raise VLLMValidationError(
                too_long(len(tokens), spans, needed, pages),
                parameter="input_tokens",
                value=len(tokens),
            )


@dataclass
class _Feature:
    modality: str
    mm_position: Any


_limits: WeakKeyDictionary[Any, FrontEndLimit | None] = WeakKeyDictionary()
"""By vLLM's input processors, of which each engine has one."""


def check_prompt(processor: Any, engine_input: Mapping[str, Any]) -> None:
    """Before a request leaves the API server: refuse what cannot ever fit."""
    if processor not in _limits:
        _limits[processor] = FrontEndLimit.of(processor.vllm_config)
    limit = _limits[processor]
    if limit is not None:
        limit.check(engine_input)
