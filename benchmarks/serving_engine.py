"""A vLLM engine in this process, driven request by request, whose KV pool can shrink and be filled.

Benchmarks of whole servers spend most of their time on two things that are not measured: starting
engines, and computing prompts.  So one engine serves all scenarios of a (model, KV cache dtype):

* *Budget*: the engine starts with the largest pool, and :meth:`BenchEngine.set_budget` takes pages
  away from it until what is left is worth so many bytes.
* *Planting*: :meth:`BenchEngine.plant` lets vLLM's own KV cache manager allocate and cache the
  pages of a prompt, chunk by chunk as its scheduler would, without computing them.  A request that
  comes later finds them in the prefix cache.  The pool was filled with random numbers before, so
  that attention reads what it would read.  Speed of decoding is measured this way; whatever
  includes the computing of prompts is measured on prompts that are computed.
* *Images* go through the model's processor once; requests share the pixels under different names,
  so that the image tower runs and no KV page is shared, and the processor costs nothing.

Requests enter at the engine core, behind tokenizer and HTTP server.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models import cache_settings, image_placeholder, noise_image

FORCED_FLASH_VERSION = 3
"""vLLM asks TurboQuant for FlashAttention 2, because version 3 did not work in layers that it
leaves at 16 bits.  In 0.32 it does, and builds for Hopper alone have no other."""


@dataclass
class Completion:
    """What happened to one request; times in seconds of :func:`time.perf_counter`."""

    name: str
    submitted: float
    prompt_tokens: int
    max_tokens: int
    first: float | None = None
    """When its first token came."""
    last: float | None = None
    """When its last token came."""
    tokens: int = 0
    cached: int = 0
    """Prompt tokens from the prefix cache."""
    reason: str | None = None


class Step(NamedTuple):
    """One step of the engine that gave tokens."""

    time: float
    tokens: int
    running: int


@dataclass
class Run:
    """A run of the engine over some requests."""

    start: float
    completions: dict[str, Completion] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    preemptions: int = 0
    most_running: int = 0
    timed_out: bool = False

    @property
    def done(self) -> list[Completion]:
        """Requests that came to their end."""
        return [c for c in self.completions.values() if c.reason == "length"]

    def full_batch(self, requests: int) -> tuple[int, float]:
        """Tokens and seconds between the first and the last step that gave all requests a token."""
        full = [i for i, s in enumerate(self.steps) if s.tokens == requests]
        if len(full) < 2:
            return 0, 0.0
        first, last = full[0], full[-1]
        tokens = sum(s.tokens for s in self.steps[first + 1 : last + 1])
        return tokens, self.steps[last].time - self.steps[first].time


class Picture(NamedTuple):
    """An image after the model's processor."""

    tokens: tuple[int, ...]
    """Its placeholder in a prompt, markers included."""
    item: Any
    """vLLM's MultiModalKwargsItem."""
    is_embed: Any
    visual_tokens: int


Part = int | tuple[str, Picture] | tuple[str, Picture, int]
"""Part of a prompt: so many text tokens, or a named image, perhaps of another length."""


class BenchEngine:
    """vLLM's engine core on a model of :mod:`benchmarks.models`, with dummy weights.

    Parameters
    ----------
    name, directory
        Model and its checkpoint directory.
    kv_cache_dtype
        KV cache dtype, perhaps with a transform or profile (:func:`.models.cache_settings`).
    kv_bytes
        Bytes of the largest pool.
    settings
        Further arguments of vLLM's ``EngineArgs``.
    """

    def __init__(
        self, name: str, directory: Path, kv_cache_dtype: str, kv_bytes: int, **settings: Any
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.executor.abstract import Executor

        load_general_plugins()
        begin = time.perf_counter()
        arguments = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "limit_mm_per_prompt": {"image": 64, "video": 0},
            "mm_processor_cache_gb": 0,
            "skip_mm_profiling": True,
            "kv_cache_memory_bytes": kv_bytes,
            **settings,
        }
        arguments = {**cache_settings(kv_cache_dtype, directory), **arguments}
        config = EngineArgs(model=str(directory), **arguments).create_engine_config()
        if kv_cache_dtype.startswith("turboquant"):
            config.attention_config.flash_attn_version = FORCED_FLASH_VERSION
        self.name, self.dtype, self.config = name, kv_cache_dtype, config
        self.inputs = InputProcessor(config)
        self.core = EngineCore(config, Executor.get_class(config), log_stats=False)
        self.scheduler = self.core.scheduler
        self.kv = self.scheduler.kv_cache_manager
        self.pool = self.kv.block_pool
        self.all_pages = self.pool.num_gpu_blocks - 1
        kv_config = self.scheduler.kv_cache_config
        self.page_bytes = sum(t.size for t in kv_config.kv_cache_tensors) // kv_config.num_blocks
        self.block_sizes = [g.kv_cache_spec.block_size for g in kv_config.kv_cache_groups]
        self.chunk = config.scheduler_config.max_num_batched_tokens
        self._ballast: list[Any] = []
        self._numbers = count(1)
        self._fill_with_noise()
        self.start_seconds = time.perf_counter() - begin

    def close(self) -> None:
        """Free the device."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.core.shutdown()
        del self.core, self.scheduler, self.kv, self.pool
        cleanup_dist_env_and_memory()

    def _fill_with_noise(self) -> None:
        """Random bytes that are finite and smaller than 2 in every floating-point format.

        The highest exponent bit of any format that has its sign in the top of a byte is bit 6.
        """
        import torch

        worker = self.core.model_executor.driver_worker.worker
        # Layers may be views of one buffer.
        buffers = {c.untyped_storage().data_ptr(): c for c in worker.model_runner.kv_caches}
        for cache in buffers.values():
            memory = torch.empty(0, dtype=torch.uint8, device=cache.device)
            memory.set_(cache.untyped_storage())
            for part in memory.split(1 << 28):
                part.random_(0, 256).bitwise_and_(0xBF)

    # The pool.

    def set_budget(self, kv_bytes: float | None) -> int:
        """Empty the prefix cache, and leave as many pages as a pool of so many bytes has.

        Returns
        -------
        int
            Pages that requests can take.
        """
        if self._ballast:
            self.pool.free_blocks(self._ballast)
            self._ballast = []
        self.forget()
        pages = self.all_pages
        if kv_bytes is not None:
            pages = min(int(kv_bytes) // self.page_bytes - 1, self.all_pages)
            if pages < 1:
                raise ValueError(f"{kv_bytes} bytes are less than two pages of {self.page_bytes}")
            self._ballast = self.pool.get_new_blocks(self.all_pages - pages)
        return pages

    def forget(self) -> None:
        """Empty the prefix cache and the cache of the image tower's outputs.

        Pages of ballast are in use as far as vLLM knows, so it would refuse while there are any.
        """
        ballast, self._ballast = self._ballast, []
        if ballast:
            self.pool.free_blocks(ballast)
        if not self.scheduler.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")
        self.core.reset_encoder_cache()
        if ballast:
            self._ballast = self.pool.get_new_blocks(len(ballast))

    @property
    def pages_in_use(self) -> int:
        """Pages that requests hold."""
        return self.all_pages - len(self._ballast) - self.pool.get_num_free_blocks()

    # Requests.

    def picture(self, tiles: tuple[int, int]) -> Picture:
        """An image of :func:`benchmarks.models.noise_image` through the model's processor."""
        from vllm import SamplingParams

        request = self.inputs.process_inputs(
            "picture",
            {
                "prompt": image_placeholder(self.name),
                "multi_modal_data": {"image": noise_image(self.name, 1, tiles)},
            },
            SamplingParams(max_tokens=1),
            supported_tasks=("generate",),
        )
        (feature,) = request.mm_features
        position = feature.mm_position
        tokens = request.prompt_token_ids[position.offset : position.offset + position.length]
        return Picture(tuple(tokens), feature.data, position.is_embed, position.get_num_embeds())

    def request(
        self,
        parts: Sequence[Part | Sequence[int]],
        max_tokens: int,
        name: str | None = None,
        salt: str | None = None,
    ) -> Any:
        """A vLLM request.

        Parameters
        ----------
        parts
            Text as a number of tokens or as the tokens, and images with a name of their own.
            Requests whose text comes as numbers and whose images have the same names share pages.
        max_tokens
            Tokens to generate; nothing else ends a request.
        name
            Id of the request, unique unless given.
        salt
            Requests with different salts share no pages.
        """
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        tokens: list[int] = []
        features = []
        for part in parts:
            if isinstance(part, int):
                tokens += [10 + (7 * len(tokens) + i * i) % 200 for i in range(part)]
            elif not (part and isinstance(part[0], str)):
                tokens += part  # type: ignore[arg-type]
            else:
                identifier, picture, *length = part
                placed, is_embed = list(picture.tokens), picture.is_embed
                if length:
                    placed, is_embed = [picture.tokens[len(placed) // 2]] * length[0], None
                features.append(
                    MultiModalFeatureSpec(
                        data=picture.item,
                        modality="image",
                        identifier=identifier,
                        mm_position=PlaceholderRange(
                            offset=len(tokens), length=len(placed), is_embed=is_embed
                        ),
                        mm_hash=identifier,
                    )
                )
                tokens += placed
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        return Request(
            request_id=name or f"r{next(self._numbers)}",
            prompt_token_ids=tokens,
            sampling_params=params,
            pooling_params=None,
            mm_features=features,
            cache_salt=salt,
            block_hasher=self.core.request_block_hasher,
        )

    def pages_of(self, request: Any) -> int | None:
        """Pages that a prompt takes when it is computed alone; None if the pool is too small.

        The pages are in the prefix cache afterwards.
        """
        scheduler, kv = self.scheduler, self.kv
        before = self.pages_in_use
        scheduler.requests[request.request_id] = request
        try:
            while (start := request.num_computed_tokens) < request.num_tokens:
                tokens = min(self.chunk, request.num_tokens - start)
                if scheduler.need_mamba_block_aligned_split:
                    tokens = scheduler._mamba_block_aligned_split(request, tokens)
                if kv.allocate_slots(request, tokens) is None:
                    return None
                request.num_computed_tokens = start + tokens
            return self.pages_in_use - before
        finally:
            kv.free(request)
            del scheduler.requests[request.request_id]
            request.num_computed_tokens = 0  # for when it runs

    def plant(self, requests: Iterable[Any]) -> None:
        """Put the prompts of requests into the prefix cache without computing them.

        Raises
        ------
        RuntimeError
            If one of them is longer than the pool.
        """
        for request in requests:
            if self.pages_of(request) is None:
                raise RuntimeError(f"{request.num_tokens} prompt tokens do not fit into the pool")

    def pages_at_end(self, prompt_pages: int, prompt_tokens: int, outputs: int) -> int:
        """Pages of a request that has generated its last token."""
        return prompt_pages + sum(
            -(-(prompt_tokens + outputs) // b) + -prompt_tokens // b for b in self.block_sizes
        )

    # Running.

    def run(
        self,
        requests: Iterable[Any],
        *,
        limit_s: float = 600,
        then: Callable[[Completion], Iterable[Any]] | None = None,
    ) -> Run:
        """Submit requests at once and step until all have ended.

        Parameters
        ----------
        requests
            Requests of :meth:`request`.
        limit_s
            Seconds after which what still runs is aborted.
        then
            Called with each request that ends; what it returns is submitted next.
        """
        run = Run(time.perf_counter())
        live: set[str] = set()

        def submit(request: Any) -> None:
            name = request.request_id
            now = time.perf_counter()
            run.completions[name] = Completion(
                name, now, request.num_prompt_tokens, request.max_tokens
            )
            live.add(name)
            self.core.add_request(request)

        for request in requests:
            submit(request)
        preempted = self._watch_preemptions(run)
        try:
            while live:
                outputs, executed = self.core.step_fn()
                self.core.post_step(model_executed=executed)
                now = time.perf_counter()
                found = [o for group in (outputs or {}).values() for o in group.outputs]
                if found:
                    tokens = sum(len(o.new_token_ids) for o in found)
                    run.steps.append(Step(now, tokens, len(self.scheduler.running)))
                run.most_running = max(run.most_running, len(self.scheduler.running))
                for output in found:
                    request_done = self._note(run.completions[output.request_id], output, now)
                    if request_done:
                        live.discard(output.request_id)
                        if then is not None:
                            for request in then(run.completions[output.request_id]):
                                submit(request)
                if now - run.start > limit_s and live:
                    run.timed_out = True
                    self.core.abort_requests(sorted(live))
                    break
            self._drain()
        finally:
            self.scheduler._preempt_request = preempted
        return run

    @staticmethod
    def _note(completion: Completion, output: Any, now: float) -> bool:
        if output.new_token_ids:
            completion.first = completion.first or now
            completion.last = now
            completion.tokens += len(output.new_token_ids)
        if output.prefill_stats is not None:
            completion.cached = output.prefill_stats.num_cached_tokens
        if output.finished:
            completion.reason = str(output.finish_reason)
        return output.finished

    def _watch_preemptions(self, run: Run) -> Callable[..., Any]:
        original = self.scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            run.preemptions += 1
            return original(*args, **kwargs)

        self.scheduler._preempt_request = counting
        return original

    def _drain(self) -> None:
        """Let steps in flight and notices of ended requests go through."""
        while self.scheduler.has_requests() or self.core.batch_queue:
            self.core.step_fn()
