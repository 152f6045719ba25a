"""Prometheus metrics: pages by format, visual tokens stored, bytes saved.

The scheduler counts in the engine core and the API server publishes.  vLLM's ``SchedulerStats``,
which travels between them, has no place for plugins; its counts of KV connector loads by stage are
an open mapping of names to ints, and KV connectors are refused with our dtypes.  Our counts ride
there under names with a prefix.  Our logger comes before vLLM's, so that it takes them out before
vLLM's log can take them for loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats

PREFIX = "calibquant:"


class PageCounts(NamedTuple):
    """What a KV pool holds at one moment, in pages of the pool and in tokens."""

    pages: int
    """Pages in use, text and visual."""
    visual_pages: int
    """Pages in use that hold codes."""
    visual_tokens: int
    """Visual tokens in those pages."""
    bytes_saved: int
    """Bytes more, in each worker, that the same tokens would take at the model's precision."""

    def to_stats(self) -> dict[str, int]:
        """As entries of an open mapping of vLLM's statistics."""
        return dict(zip(STAT_NAMES, self, strict=True))

    @classmethod
    def take(cls, stats: dict[str, int]) -> PageCounts | None:
        """Take them out of the mapping again; None if the engine sent none."""
        if STAT_NAMES[0] not in stats:
            return None
        return cls(*(stats.pop(name) for name in STAT_NAMES))


STAT_NAMES = tuple(PREFIX + name for name in PageCounts._fields)


class CalibQuantStatLogger(AggregateStatLoggerBase):
    """Publishes the :class:`PageCounts` of all engines."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self.engine_indexes = engine_indexes
        self.model_name = vllm_config.model_config.served_model_name
        self.gauges: dict[str, Gauge] = {}
        self._shown: dict[int, PageCounts] = {}

    def log_engine_initialized(self) -> None:
        """Create the gauges.

        Not before: vLLM's own logger clears everything named ``vllm:`` when it is made.
        """
        if self.gauges:
            return
        for name, text, labels in (
            ("pages", "KV cache pages in use, by format.", ["format"]),
            ("visual_tokens", "Visual tokens stored in codes, in pages in use.", []),
            (
                "bytes_saved",
                "Bytes of KV cache, in each worker, that codes save now against pages at the "
                "model's precision.",
                [],
            ),
        ):
            self.gauges[name] = Gauge(
                f"vllm:calibquant_{name}",
                text,
                ["model_name", "engine", *labels],
                multiprocess_mode="mostrecent",
            )
        for engine in self.engine_indexes:
            self._set(PageCounts(0, 0, 0, 0), engine)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Publish the counts of one step."""
        if scheduler_stats is None:
            return
        counts = PageCounts.take(scheduler_stats.num_kv_fetch_reqs_by_stage)
        if counts is not None and self.gauges:
            self._set(counts, engine_idx)

    def _set(self, counts: PageCounts, engine: int) -> None:
        if self._shown.get(engine) == counts:
            return  # most steps of a decode
        self._shown[engine] = counts
        labels = {"model_name": self.model_name, "engine": str(engine)}
        pages = self.gauges["pages"]
        pages.labels(**labels, format="text").set(counts.pages - counts.visual_pages)
        pages.labels(**labels, format="visual").set(counts.visual_pages)
        self.gauges["visual_tokens"].labels(**labels).set(counts.visual_tokens)
        self.gauges["bytes_saved"].labels(**labels).set(counts.bytes_saved)
