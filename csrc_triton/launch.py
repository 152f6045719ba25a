"""Launches that do not look for their compiled kernel again.

``kernel[grid](...)`` finds out for which types, alignments and constants it is meant by looking at
every argument and at every global constant of the kernel: 28 us of an H200's host, three times a
layer, and the host bounds a step that no CUDA graph holds.  :func:`launch` looks at what can differ
between two calls, and asks Triton once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNMENT = 16
"""Bytes, and what a number is a multiple of: Triton compiles another kernel for what is not."""


@dataclass(frozen=True)
class _Parameters:
    """Which arguments of a kernel decide how it is compiled."""

    kernel: JITFunction
    """Held, so that no other has its id."""
    tensors: tuple[int, ...]
    aligned: tuple[int, ...]
    numbers: tuple[int, ...]
    constants: tuple[str, ...]
    """Names of what comes behind the arguments."""

    @classmethod
    def of(cls, kernel: JITFunction, args: Sequence[Any]) -> _Parameters:
        params = kernel.params
        tensors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        numbers = [i for i, x in enumerate(args) if isinstance(x, int)]
        return cls(
            kernel,
            tuple(tensors),
            tuple(i for i in tensors if not params[i].do_not_specialize_on_alignment),
            tuple(i for i in numbers if not params[i].do_not_specialize),
            tuple(kernel.arg_names[len(args) :]),
        )


_parameters: dict[int, _Parameters] = {}
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, but faster from the second time on.

    Parameters
    ----------
    kernel
        A kernel of Triton or Gluon.
    grid
        Programs in up to three dimensions.
    args
        Its tensors and numbers, in order and of the same kinds in every call; numbers that it does
        not specialise are less than ``2**31``.
    constants
        Its other parameters by name, and options of the compiler.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](*args, **constants)
        return
    found = _parameters.get(id(kernel))
    if found is None:
        found = _parameters[id(kernel)] = _Parameters.of(kernel, args)
    pointers = 0
    for i in found.aligned:
        pointers |= args[i].data_ptr()
    if pointers % ALIGNMENT:
        kernel[grid](*args, **constants)
        return
    numbers = [args[i] for i in found.numbers]
    key = (
        id(kernel),
        driver.active.get_current_device(),
        *[args[i].dtype for i in found.tensors],
        # 1, multiples, and what takes more than 32 bits have kernels of their own.
        *[(x == 1) + 2 * (x % ALIGNMENT == 0) + 4 * (x >> 31) for x in numbers],
        *constants,
        *constants.values(),
    )
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, **constants)
        return
    compiled[(*grid, 1, 1)[:3]](*args, *[constants[name] for name in found.constants])
