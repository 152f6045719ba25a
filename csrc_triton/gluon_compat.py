"""Names of Gluon that differ between the versions of Triton that are served, 3.6 to 3.9."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

async_load = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
"""Copy from global to shared memory; the later versions keep the older name to refuse it."""

barrier = getattr(gl, "thread_barrier", None) or gl.barrier
"""Wait for the other threads of the program, and see what they have stored."""

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as another type."""
        return buffer.reinterpret(dtype, shape, layout)

else:

    @gluon.jit
    def reinterpret(buffer, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        """The same shared memory as another type."""
        return buffer._reinterpret(dtype, shape, layout)
