"""Launches past Triton's search find the compiled kernel that Triton would; without a GPU."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver, jit

from csrc_triton.launch import launch
from tests.test_warmup import Hopper, triton_key


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_loose"])
def _kernel(p_x, p_loose, stride, n, scale, B: tl.constexpr, HAS_X: tl.constexpr):
    pass


@pytest.fixture
def launches(monkeypatch):
    """Pairs of what was launched and what Triton would have launched; launches through Triton."""
    found, through_triton = [], []

    class Compiled:
        def __init__(self, key, options):
            self.key, self.options = key, options

        def __getitem__(self, grid):
            assert grid == (2, 1, 1)
            return lambda *args: found.append(
                (self.key, triton_key(_kernel, *args, **self.options))
            )

    def run(self, *args, grid, warmup, **kwargs):
        through_triton.append(args)
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        return Compiled(triton_key(self, *args, **kwargs), options)

    monkeypatch.setattr(importlib.import_module("csrc_triton.launch"), "_compiled", {})
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", Hopper())
    return found, through_triton


def test_launches_find_what_triton_would(launches):
    found, through_triton = launches
    words = torch.zeros(64, dtype=torch.int32)
    tensors = [words, words[1:], words[4:], words.view(torch.float16), words.view(torch.bfloat16)]
    numbers = (0, 1, 2, 16, 48, 2**31 - 1, 2**31, 2**31 + 16)
    cases = list(
        itertools.product(tensors, tensors[:2], numbers, (1, 7, 16), ({}, {"num_warps": 2}))
    )
    for _ in range(2):
        for x, loose, stride, n, more in cases:
            launch(_kernel, (2,), x, loose, stride, n, 0.5, B=16, HAS_X=n > 1, **more)
    aligned = [case for case in cases if case[0].data_ptr() % 16 == 0]
    assert len(found) + len(through_triton) == 2 * len(cases)
    assert len(found) > len(aligned)
    assert all(ours == tritons for ours, tritons in found)


def test_what_is_not_aligned_is_left_to_triton(launches):
    found, through_triton = launches
    x = torch.zeros(64, dtype=torch.int32)
    for start in (0, 0, 1, 1, 4):
        launch(_kernel, (2,), x[start:], x, 3, 5, 0.5, B=16, HAS_X=True)
    assert len(found) == 2
    assert len(through_triton) == 3
