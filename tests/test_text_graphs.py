"""CUDA graphs of batches of text, in vLLM's own graph manager without a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_calibquant import compat
from vllm_calibquant.text_graphs import GRAPH_KIND

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


class Graph:
    """A graph that knows what was captured, and what was replayed."""

    capturing: ClassVar[list[str]] = []
    replayed: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.holds: list[str] = []

    @contextlib.contextmanager
    def capture(self):
        Graph.capturing = self.holds
        yield

    def replay(self) -> None:
        Graph.replayed += self.holds


@pytest.fixture
def manager(monkeypatch):
    """Makes graph managers whose graphs are lists of names."""
    for name in ("capture", "run_fullgraph"):
        monkeypatch.setattr(CudaGraphManager, name, getattr(CudaGraphManager, name))
    compat.add_text_graphs()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph.capture())
    nothing = contextlib.nullcontext
    monkeypatch.setattr(cudagraph_utils, "graph_capture", lambda device: nothing())
    monkeypatch.setattr(cudagraph_utils, "capture_pool", lambda pool, config: nothing())
    monkeypatch.setattr(cudagraph_utils, "current_stream", lambda: None)
    monkeypatch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (7, 9))
    monkeypatch.setattr(GRAPH_KIND, "text", False)
    Graph.replayed = []

    def make(dtype: str, modes: tuple[CUDAGraphMode, ...] = (PIECEWISE, FULL)) -> CudaGraphManager:
        made = object.__new__(CudaGraphManager)
        vars(made).update(
            vllm_config=SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=dtype)),
            device="cuda",
            graphs={},
            pool=None,
            ubatch_runner=None,
            use_breakable_cg=False,
            _graphs_captured=False,
            _max_full_descs_to_capture=None,
            _capture_mem_samples=None,
            _capture_descs={
                mode: [BatchExecutionDescriptor(mode, n, n) for n in (8, 4)] for mode in modes
            },
        )
        return made

    return make


def forward_of(seen: list[str]):
    """A step that leaves its name, as the metadata builder would make it."""

    def create(desc: BatchExecutionDescriptor, warmup: bool):
        GRAPH_KIND.text = GRAPH_KIND.capturing_text
        name = f"{'text' if GRAPH_KIND.text else 'mixed'} {desc.cg_mode.name} {desc.num_tokens}"

        def forward(mode: CUDAGraphMode) -> None:
            seen.append(name)
            if not warmup:
                Graph.capturing.append(name)

        return forward

    return create


def test_each_kind_has_its_graphs(manager):
    ours, seen = manager("calibquant1"), []
    ours.capture(forward_of(seen))
    # A piecewise graph holds no attention, so one serves both.
    assert [name for name in seen if "PIECEWISE" in name] == [
        name for n in (8, 4) for name in [f"mixed PIECEWISE {n}"] * 2
    ]
    assert not GRAPH_KIND.capturing_text
    for text, kind in ((True, "text"), (False, "mixed"), (True, "text")):
        GRAPH_KIND.text = text
        Graph.replayed = []
        for desc in ours._capture_descs[FULL]:
            ours.run_fullgraph(desc)
        assert Graph.replayed == [f"{kind} FULL 8", f"{kind} FULL 4"]
    # What comes back is what vLLM knows, for its own counts.
    assert set(ours.graphs) == set(ours._capture_descs[FULL])
    assert set(ours._capture_descs) == {PIECEWISE, FULL}


def test_other_dtypes_are_left_alone(manager):
    stock, seen = manager("auto"), []
    stock.capture(forward_of(seen))
    assert not any("text" in name for name in seen)
    GRAPH_KIND.text = True
    stock.run_fullgraph(stock._capture_descs[FULL][0])
    assert Graph.replayed == ["mixed FULL 8"]


def test_estimates_of_memory_count_both(manager, monkeypatch):
    ours, seen = manager("calibquant1"), []
    ours._capture_mem_samples = []
    free = iter((90, 60, 60, 50))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (next(free), 100))
    ours.capture(forward_of(seen))
    assert ours._capture_mem_samples == [30, 20]  # the first one allocates the pool
    assert not any("text" in name for name in seen)


def test_only_piecewise_graphs(manager):
    ours, seen = manager("calibquant1", (PIECEWISE,)), []
    ours.capture(forward_of(seen))
    assert not any("text" in name for name in seen)


def test_capturing_ends_with_an_error(manager):
    ours = manager("calibquant1", (FULL,))

    def create(desc, warmup):
        if GRAPH_KIND.capturing_text:
            raise RuntimeError("out of memory")
        return lambda mode: None

    with pytest.raises(RuntimeError, match="out of memory"):
        ours.capture(create)
    assert not GRAPH_KIND.capturing_text
    assert len(ours.graphs) == 2
