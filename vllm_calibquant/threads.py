"""Products of small matrices, which threads only slow down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute in the calling thread; also a decorator.

    PyTorch starts as many threads as the machine has cores.  In a container that may use a few of
    them they wait for each other: the bases of a model of 28 layers took 2 s with one thread on 2
    cores, and 166 s with 192.  vLLM's CPU workers have a thread for each of their cores, bound to
    it; they replace ``torch.set_num_threads``, and are left alone.
    """
    if torch.set_num_threads is not torch._C.set_num_threads:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
