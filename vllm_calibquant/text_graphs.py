"""CUDA graphs for batches of text, beside those that read codes.

A graph of a decode step serves every batch of its size, and one that reads codes has two more
launches in each layer, which text would pay for.  So vLLM's graph manager captures every size twice
and replays the graph of the kind that the step's metadata was built for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class GraphKind:
    """Which of the two graphs of a size is meant."""

    def __init__(self) -> None:
        self.capturing_text = False
        """Whether what is being captured is for batches of text."""
        self.text = False
        """Whether the last metadata was built for such a batch."""


GRAPH_KIND = GraphKind()
"""Of this process, which has one worker."""


def capture_both(manager: Any, full: Any, capture: Callable[[], None]) -> None:
    """Capture the graphs that read codes, and those of text.

    Parameters
    ----------
    manager
        vLLM's ``CudaGraphManager``.
    full
        Key of the graphs of whole steps among its descriptors.
    capture
        Captures the descriptors into ``manager.graphs``.
    """
    capture()
    descriptors, graphs = manager._capture_descs, manager.graphs
    if not descriptors.get(full):
        return
    samples = manager._capture_mem_samples
    if samples is not None:  # vLLM estimates the memory of all graphs from a few
        samples[1:] = [2 * sample for sample in samples[1:]]
        return
    manager._capture_descs, manager.graphs = {full: descriptors[full]}, {}
    GRAPH_KIND.capturing_text = True
    try:
        capture()
        manager.text_graphs = manager.graphs
    finally:
        GRAPH_KIND.capturing_text = False
        manager._capture_descs, manager.graphs = descriptors, graphs


def run_either(manager: Any, run: Callable[[], None]) -> None:
    """Replay the graph of the kind that the step's metadata was built for.

    Parameters
    ----------
    manager
        vLLM's ``CudaGraphManager``.
    run
        Replays a graph of ``manager.graphs``.
    """
    graphs = manager.graphs
    if GRAPH_KIND.text:
        manager.graphs = manager.text_graphs
    try:
        run()
    finally:
        manager.graphs = graphs
