"""vLLM's schedulers, with spans for the manager, chunks that fill pages, and counts for metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.multimodal.utils import get_mm_features_in_window
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_calibquant.admission import chunk_tokens, too_long
from vllm_calibquant.config import load_config
from vllm_calibquant.core.blocks import distinct_pages
from vllm_calibquant.core.layout import clip_chunk, prompt_pages
from vllm_calibquant.core.manager import MixedPageManager
from vllm_calibquant.core.report import capacity_line, profile_line
from vllm_calibquant.metrics import PageCounts
from vllm_calibquant.profile import load_profile

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.request import Request


logger = init_logger("vllm.calibquant")  # under vLLM's logger, which is the one with a handler


class MixedPageScheduler(Scheduler):
    """Scheduler for mixed pages.

    Raises
    ------
    RuntimeError
        If no KV cache group has mixed pages: then the dtype was accepted but the plugin is not
        active in this process, and serving would silently use 16-bit pages.
    """

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.mixed_page_managers = [m for m in managers if isinstance(m, MixedPageManager)]
        if not self.mixed_page_managers:
            raise RuntimeError(
                f"--kv-cache-dtype {self.cache_config.cache_dtype} was accepted, but no layer has "
                "mixed pages; reinstall vllm-calibquant in the environment of the engine"
            )
        for manager in self.mixed_page_managers:
            manager.requests = self.requests
        groups = self.kv_cache_config.kv_cache_groups
        layers = [len(groups[m.kv_cache_group_id].layer_names) for m in self.mixed_page_managers]
        self._page_bytes = [
            n * m.kv_cache_spec.page_size_bytes
            for n, m in zip(layers, self.mixed_page_managers, strict=True)
        ]
        specs = [manager.kv_cache_spec for manager in managers]
        pages = self.kv_cache_config.num_blocks
        page_bytes = sum(t.size for t in self.kv_cache_config.kv_cache_tensors) / pages
        line = capacity_line(self.cache_config.cache_dtype, specs, pages - 1, page_bytes)
        logger.info("%s", line)
        config = self.vllm_config
        path = load_config(self.cache_config.cache_dtype, config.additional_config).profile
        if path:
            logger.info("%s", profile_line(load_profile(path), path, config.model_config.model))
        # vLLM asks its Mamba splitter for the end of every chunk when this is set.  Models with
        # Mamba layers are refused, so the question is ours alone to answer.
        self.need_mamba_block_aligned_split = True
        self._computed_anew: set[str] = set()

    # Requests that are longer than the pool.

    def add_request(self, request: Request) -> None:
        """End a request that cannot ever fit, and any other one where the pool ends."""
        known = request.request_id in self.requests
        super().add_request(request)
        if known or request.resumable:
            return
        room = self._room(request)
        if room < 0:
            self._refuse(request)
        else:
            request.max_tokens = min(request.max_tokens, room + 1)  # the last is never stored

    def _pages(self, request: Request, num_tokens: int) -> int:
        """Pages, over all groups, of a request that is computed alone up to so many tokens."""
        pages = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            spans, slots = [], 1
            if isinstance(manager, MixedPageManager):
                spans, slots = manager.spans(request.request_id), manager.kv_cache_spec.slots
            pages += prompt_pages(
                spans,
                num_tokens,
                chunk_tokens(self.scheduler_config),
                block_size=manager.block_size,
                slots=slots,
                cut=partial(self._encoder_cut, request),
            )
        return pages

    def _encoder_cut(self, request: Request, start: int, end: int) -> int:
        """Where vLLM ends a chunk of a request alone, for want of room for images it embeds.

        The twin of ``Scheduler._try_schedule_encoder_inputs``.
        """
        whole = self.scheduler_config.disable_chunked_mm_input
        budget = self.max_num_encoder_input_tokens
        room = self.encoder_cache_manager.cache_size
        seen = set()
        first, last = get_mm_features_in_window(request.mm_features, start, end)
        for feature in request.mm_features[first:last]:
            where, embeds = feature.mm_position, feature.mm_position.get_num_embeds()
            if where.offset > start:
                if whole and end < where.offset + where.length:
                    return where.offset
                if feature.identifier not in seen and embeds > min(budget, room):
                    return where.offset
            if feature.identifier not in seen:
                room -= embeds
                budget -= embeds if where.offset >= start else 0
            seen.add(feature.identifier)
        return end

    def _room(self, request: Request) -> int:
        """Tokens of an answer that fit behind the prompt, alone in the pool; below 0 if it does not
        fit itself.
        """
        prompt, block_size = request.num_prompt_tokens, self.mixed_page_managers[0].block_size
        groups = len(self.kv_cache_manager.coordinator.single_type_managers)
        free = self.kv_cache_manager.block_pool.num_gpu_blocks - 1 - self._pages(request, prompt)
        return free // groups * block_size + -prompt % block_size if free >= 0 else -1

    def _refuse(self, request: Request) -> None:
        pages = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        spans = self.mixed_page_managers[0].spans(request.request_id)
        logger.error(
            "Request %s ends with an error. %s",
            request.request_id,
            too_long(request.num_tokens, spans, self._pages(request, request.num_tokens), pages),
        )
        # vLLM ends the requests of this set with an error after the step.
        self.grammar_compile_error_reqs.add(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan a step; see to it that no request waits for pages that nobody will free."""
        alone: AbstractContextManager[list[Request]] = nullcontext([])
        if self._computed_anew and self._anew_is_first():
            alone = self._alone()
        with alone as short:
            output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens == 0 and not self.running:
            self._free_the_way(short)
        return output

    def _first(self) -> Request | None:
        """The request whose turn it is, if it can run."""
        ready = (RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED)
        requests = chain(self.running, self.kv_holding_waiting, self.waiting)
        return next((r for r in requests if r.status in ready), None)

    def _anew_is_first(self) -> bool:
        """Whether that is one to be computed anew, and not done with its prompt yet."""
        first = self._first()
        if first is None or first.request_id not in self._computed_anew:
            return False
        return not self.running or first.num_computed_tokens < first.num_tokens - 1

    @contextmanager
    def _alone(self) -> Iterator[list[Request]]:
        """Nobody else is admitted, and chunks are whole; notes who asks for pages in vain."""
        short: list[Request] = []
        kv, config = self.kv_cache_manager, self.scheduler_config
        allocate, threshold = kv.allocate_slots, config.long_prefill_token_threshold
        most = self.max_num_active_reqs

        def allocate_slots(request: Request, *args: Any, **kwargs: Any) -> Any:
            blocks = allocate(request, *args, **kwargs)
            if blocks is None:
                short.append(request)
            return blocks

        kv.allocate_slots = allocate_slots  # type: ignore[method-assign]
        config.long_prefill_token_threshold = 0
        self.max_num_active_reqs = 1 + self.num_waiting_for_streaming_input
        try:
            yield short
        finally:
            del kv.allocate_slots  # the method again
            config.long_prefill_token_threshold = threshold
            self.max_num_active_reqs = most

    def _free_the_way(self, short: list[Request]) -> None:
        """The first request that could run waits though nobody else has pages.

        Chunks that were cut short beside other requests leave pages partly filled, and such pages
        can come back from the prefix cache; so it is computed anew, without the cache and alone,
        and refused if it is short of pages then too.  A session of streaming input that has grown
        longer than the pool keeps its pages from turn to turn, and is refused likewise.
        """
        request = self._first()
        if (
            request is None
            or self._pause_state != PauseState.UNPAUSED
            or request.num_stale_output_tokens  # vLLM waits for steps in flight, and goes on then
            or request.request_id in self.grammar_compile_error_reqs
        ):
            return
        pool = self.kv_cache_manager.block_pool
        managers = self.kv_cache_manager.coordinator.single_type_managers
        blocks = [m.req_to_blocks.get(request.request_id, ()) for m in managers]
        held = sum(map(len, map(distinct_pages, blocks)))
        if pool.num_gpu_blocks - 1 - pool.get_num_free_blocks() > held:
            return
        if request in short:
            self._refuse(request)
        self._computed_anew.add(request.request_id)
        request.skip_reading_prefix_cache = True

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._computed_anew.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """End a chunk that cuts an image at a whole page."""
        start = request.num_computed_tokens + num_new_local_computed_tokens
        if not request.mm_features or start >= request.num_prompt_tokens:
            return num_new_tokens  # asked of every request in every step
        manager = self.mixed_page_managers[0]
        spans = manager.spans(request.request_id)
        if not spans or start >= spans[-1].end:
            return num_new_tokens
        spec = manager.kv_cache_spec
        return clip_chunk(
            spans, start, num_new_tokens, block_size=spec.block_size, slots=spec.slots
        )

    def page_counts(self) -> PageCounts:
        """What the pool holds now."""
        pool = self.kv_cache_manager.block_pool
        visual = saved = 0
        for manager, page_bytes in zip(self.mixed_page_managers, self._page_bytes, strict=True):
            ledger = manager.ledger
            visual += ledger.held_pages
            saved += (ledger.held_slots - ledger.held_pages) * page_bytes
        first = self.mixed_page_managers[0]
        return PageCounts(
            pages=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            visual_pages=visual,
            # Every group holds every token, for layers of its own.
            visual_tokens=first.ledger.held_slots * first.block_size,
            bytes_saved=saved,
        )

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Add our counts to the statistics that travel to the API server."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.num_kv_fetch_reqs_by_stage.update(self.page_counts().to_stats())
        return stats


class MixedPageAsyncScheduler(MixedPageScheduler, AsyncScheduler):
    """The same over vLLM's scheduler that plans a step ahead."""
