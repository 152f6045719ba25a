"""What would be launched on a GPU that is not there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class Hopper:
    """What Triton asks a driver before a kernel is compiled."""

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0


def triton_key(kernel: jit.JITFunction, *args, **kwargs) -> str:
    """What Triton keeps a compiled kernel under."""
    _, key_cache, _, _, binder = kernel.device_caches[0]
    _, specialization, options = binder(*args, **{**kwargs, "debug": False})
    return jit.compute_cache_key(key_cache, specialization, options)


@dataclass
class Launches:
    """What was launched."""

    keys: set[tuple[str, str]] = field(default_factory=set)
    """Kernels and keys of what went through Triton."""
    through_triton: int = 0
    past_triton: list[tuple[tuple[int, ...], str, str]] = field(default_factory=list)
    """Grid, key of the kernel found without Triton, and the key that Triton would have found."""


class Compiled(NamedTuple):
    """A compiled kernel that checks whether Triton too would have launched it."""

    launches: Launches
    kernel: jit.JITFunction
    key: str
    options: dict[str, Any]

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3

        def launched(*args) -> None:
            key = triton_key(self.kernel, *args, **self.options)
            self.launches.past_triton.append((grid, self.key, key))
            assert key == self.key

        return launched


def record_launches(monkeypatch) -> Launches:
    """Put a record in place of launches."""
    launches = Launches()

    def run(self, *args, grid, warmup, **kwargs):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        key = triton_key(self, *args, **kwargs)
        launches.keys.add((self.fn.__name__, key))
        launches.through_triton += 1
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        return Compiled(launches, self, key, options)

    monkeypatch.setattr(importlib.import_module("csrc_triton.launch"), "_compiled", {})
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", Hopper())
    return launches
