"""Launches past Triton's search find the compiled kernel that Triton would; without a GPU."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from csrc_triton.launch import launch
from tests.launches import record_launches


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["p_loose"])
def _kernel(p_x, p_loose, stride, n, scale, B: tl.constexpr, HAS_X: tl.constexpr):
    pass


def test_launches_find_what_triton_would(monkeypatch):
    launches = record_launches(monkeypatch)
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
    found = launches.past_triton
    assert len(found) + launches.through_triton == 2 * len(cases)
    assert len(found) > len(aligned)
    assert all(grid == (2, 1, 1) and ours == tritons for grid, ours, tritons in found)


def test_what_is_not_aligned_is_left_to_triton(monkeypatch):
    launches = record_launches(monkeypatch)
    x = torch.zeros(64, dtype=torch.int32)
    for start in (0, 0, 1, 1, 4):
        launch(_kernel, (2,), x[start:], x, 3, 5, 0.5, B=16, HAS_X=True)
    assert len(launches.past_triton) == 2
    assert launches.through_triton == 3
