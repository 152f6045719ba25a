"""vLLM's schedulers, with spans for the manager, chunks that fill pages, and counts for metrics."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
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
        first = self.mixed_page_managers[0]
        logger.info(
            "%s",
            capacity_line(
                self.cache_config.cache_dtype,
                first.kv_cache_spec,
                self.kv_cache_manager.block_pool.num_gpu_blocks - 1,
                layers[0],
            ),
        )
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
        if room < 1:
            self._refuse(request)
        else:
            request.max_tokens = min(request.max_tokens, room)

    def _pages(self, request: Request, num_tokens: int) -> int:
        """Pages, over all groups, of a request that is computed alone up to so many tokens."""
        pages = 0
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            spans, slots = [], 1
            if isinstance(manager, MixedPageManager):
                spans, slots = manager.spans(request.request_id), manager.kv_cache_spec.slots
            chunk = chunk_tokens(self.scheduler_config)
            pages += prompt_pages(
                spans, num_tokens, chunk, block_size=manager.block_size, slots=slots
            )
        return pages

    def _room(self, request: Request) -> int:
        """Tokens that a request can have after its prompt, alone in the pool; at most 0 if none."""
        prompt, block_size = request.num_prompt_tokens, self.mixed_page_managers[0].block_size
        groups = len(self.kv_cache_manager.coordinator.single_type_managers)
        free = self.kv_cache_manager.block_pool.num_gpu_blocks - 1 - self._pages(request, prompt)
        return free // groups * block_size + -prompt % block_size

    def _refuse(self, request: Request) -> None:
        pages = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        spans = self.mixed_page_managers[0].spans(request.request_id)
        needed = self._pages(request, request.num_tokens + 1)
        logger.error(
            "Request %s ends with an error. %s",
            request.request_id,
            too_long(request.num_tokens, spans, needed, pages),
        )
        # vLLM ends the requests of this set with an error after the step.
        self.grammar_compile_error_reqs.add(request.request_id)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Plan a step; see to it that no request waits for pages that nobody will free."""
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens == 0 and not self.running:
            self._free_the_way()
        return output

    def _free_the_way(self) -> None:
        """The first request that could run waits though nobody else has pages.

        Chunks that were cut short beside other requests leave pages partly filled, and such pages
        can come back from the prefix cache; so it is computed anew, without the cache, and refused
        if that does not help.  A session of streaming input that has grown longer than the pool
        keeps its pages from turn to turn, and is refused at once.
        """
        ready = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        waiting = chain(self.kv_holding_waiting, self.waiting)
        request = next((r for r in waiting if r.status in ready), None)
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
        if held or request.request_id in self._computed_anew:
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
