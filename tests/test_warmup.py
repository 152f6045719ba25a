"""What CUDA servers compile at start is all that their steps ask for; counted without a GPU.

Launches go through Triton's own binders up to the key of its cache, for a device that is not there.
"""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils

import csrc_triton
from csrc_triton.tables import DeviceFormat
from tests.launches import record_launches
from tests.test_profile import make_profile
from vllm_calibquant.attention.reference import Calibration
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.attention.warmup import serve_empty_step, step_shapes, warm_up
from vllm_calibquant.config import load_config
from vllm_calibquant.format import PageFormat
from vllm_calibquant.profile import ModelIdentity

MAX_REQS, MAX_TOKENS = 256, 2048


@pytest.fixture
def keys(monkeypatch) -> set[tuple[str, str]]:
    """Kernels and keys of what is launched, in place of launches."""
    return record_launches(monkeypatch).keys


@pytest.fixture
def cuda(monkeypatch):
    """The CUDA backend, on tensors of the CPU."""

    def attend(q, return_softmax_lse=False, **_):
        out = torch.zeros(q.shape, dtype=q.dtype)
        return (out, torch.zeros(q.shape[1], q.shape[0])) if return_softmax_lse else out

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", attend, raising=False)
    module = importlib.import_module("vllm_calibquant.attention.cuda")
    monkeypatch.setattr(module, "flash_attn_varlen_func", attend)
    for home in ("decode", "prefill", "store"):
        kernels = importlib.import_module(f"csrc_triton.{home}")
        monkeypatch.setattr(kernels, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr("csrc_triton.prefill._multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return module


def make_parts(
    cuda, monkeypatch, codec: Codec, heads: int, kv_heads: int, settings: dict,
    dtype: torch.dtype = torch.bfloat16, num_sms: int = 132,
):  # fmt: skip
    """A metadata builder and a layer, of which only what needs vLLM's configuration is made up."""
    config = load_config("calibquant1", {"calibquant": settings})
    head_size = codec.page_format.head_size
    tables = csrc_triton.allocate_tables(
        max_num_reqs=MAX_REQS,
        max_num_blocks=256,
        max_num_tokens=MAX_TOKENS,
        slots=codec.page_format.slots,
        num_kv_heads=kv_heads,
        device="cpu",
        num_sms=num_sms,
    )
    step = cuda.Step(tables)
    builder = object.__new__(cuda.MixedCUDAMetadataBuilder)
    vars(builder).update(
        tables=tables,
        no_pages=tables,
        step=step,
        device=torch.device("cpu"),
        kv_cache_spec=SimpleNamespace(dtype=dtype),
        cache_config=SimpleNamespace(cache_dtype="calibquant1"),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_seqs=MAX_REQS, max_num_batched_tokens=MAX_TOKENS
            )
        ),
    )

    def build(self, prefix, common, fast_build):
        return cuda.FlashAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )

    monkeypatch.setattr(cuda.FlashAttentionMetadataBuilder, "build", build)
    impl = object.__new__(cuda.MixedCUDAImpl)
    weights = {
        **cuda._weights("key", codec.key_estimator),
        **cuda._weights("value", codec.value_estimator),
    }
    page_format = DeviceFormat(codec.page_format, "cpu", **weights)
    vars(impl).update(
        codec=codec,
        page_format=page_format,
        turns=None if codec.basis is None else csrc_triton.Turns.of(codec.basis, page_format),
        tables=tables,
        scratch=csrc_triton.allocate_scratch(
            tables, heads, head_size, codec.page_format.value_planes
        ),
        step=step,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        calibration=Calibration(config.tau_min, config.tau_max) if config.calibrated else None,
        quantile=config.quantile if config.estimator == "quantile" else None,
        vllm_flash_attn_version=3,
    )
    layer = SimpleNamespace(impl=impl)
    return builder, layer


class Server:
    """Steps as vLLM's model runner passes them: parts of buffers that live as long as it does."""

    def __init__(self, builder, layer, width: int) -> None:
        self.builder, self.layer = builder, layer
        self.block_table = torch.zeros(MAX_REQS, width, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_REQS, dtype=torch.int32)
        self.starts = torch.zeros(MAX_REQS + 1, dtype=torch.int32)
        self.slots = torch.full((2, MAX_TOKENS), -1)
        impl = layer.impl
        self.kv_cache = torch.zeros(
            3, impl.num_kv_heads, 16, 2 * impl.head_size, dtype=torch.bfloat16
        )

    def step(self, new: list[int], context: list[int], visual: list[range], *, fused: bool) -> None:
        """Some requests' new tokens beside their cached ones.

        The visual tokens of a request are in ``visual``.  Q, K and V are one tensor if ``fused``.
        """
        n, tokens, impl = len(new), sum(new), self.layer.impl
        starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        lengths = torch.tensor(new, dtype=torch.int32) + torch.tensor(context, dtype=torch.int32)
        self.starts[: n + 1], self.seq_lens[:n] = starts, lengths
        common = CommonAttentionMetadata(
            query_start_loc=self.starts[: n + 1],
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens[:n],
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=n,
            num_actual_tokens=tokens,
            max_query_len=max(new),
            max_seq_len=int(lengths.max()),
            block_table_tensor=self.block_table[:n],
            slot_mapping=self.slots[1, :tokens],
        )
        heads = (impl.num_heads, impl.num_kv_heads, impl.num_kv_heads)
        shape = (tokens, sum(heads), impl.head_size)
        query, key, value = torch.empty(shape, dtype=torch.bfloat16).split(heads, dim=1)
        if not fused:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        codes = any(v.stop > cached for v, cached in zip(visual, context, strict=True))
        metadata = self.builder._build(common, False, True, visual, codes)
        output = torch.empty(query.shape, dtype=torch.bfloat16)
        impl.forward(self.layer, query, key, value, self.kv_cache, metadata, output)


def ragged_steps(draw: random.Random):
    """New and cached tokens of requests, decodes first: small, large, few, many."""
    for _ in range(60):
        decodes = draw.choice((0, 0, 1, 2, 3, 15, 16, 17, 100, MAX_REQS - 4))
        new, room = [1] * decodes, MAX_TOKENS - decodes
        for _ in range(draw.choice((0, 1, 1, 2, 3, 16, 60))):
            tokens = draw.choice((2, 3, 16, 17, 128, 500, room, draw.randint(2, MAX_TOKENS)))
            if len(new) < MAX_REQS and 2 <= tokens <= room:
                new.append(tokens)
                room -= tokens
        if new:
            yield new, [draw.choice((0, 1, 16, 40, 3000)) if n > 1 else 40 for n in new]


def of_profile(head_size: int, dtype: torch.dtype = torch.bfloat16) -> Codec:
    widths = ((2,) * (head_size // 2) + (1,) * (head_size // 2),) * 2
    profile = make_profile(ModelIdentity("llama", 1, 2, head_size, 64, "0" * 16), [widths])
    return Codec.of_profile(profile, 0, slice(0, 2), dtype)


def of_width(num_kv_heads: int, head_size: int, **settings: Any) -> Codec:
    config = load_config("calibquant1", {"calibquant": settings})
    return Codec.of(config, num_kv_heads, head_size, torch.bfloat16)


CASES = {
    "1 bit": (of_width(4, 128), 28, 4, {}),
    "1 bit, calibrated, a head each": (
        of_width(8, 128),
        8,
        8,
        {"preset": "calibquant-paper"},
    ),
    "plain Triton, a lone KV head": (
        of_width(1, 80),
        16,
        1,
        {"preset": "calibquant-paper", "range_estimator": "quantile"},
    ),
    "1 bit, transformed": (of_width(4, 128, transform="hadamard"), 28, 4, {}),
    "profile": (of_profile(64), 6, 2, {"preset": "calibquant-paper"}),
    "profile, plain Triton": (of_profile(32), 4, 2, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_compiles_after_the_start(case: str, cuda, keys, monkeypatch):
    builder, layer = make_parts(cuda, monkeypatch, *CASES[case])
    warm_up(builder, {"layer": layer}, images=True)
    warm = set(keys)
    # Nor is a format made again, which would take longer than all launches of a layer.
    monkeypatch.delattr(PageFormat, "__post_init__")
    draw = random.Random(case)
    for width in (250, 256):
        server = Server(builder, layer, width)
        for new, context in ragged_steps(draw):
            codes = draw.random() < 0.5  # in some request, a new one
            ends = [
                draw.choice((0, old, old + n if codes and n > 1 else old))
                for n, old in zip(new, context, strict=True)
            ]
            cached = draw.random() < 0.5  # in some request, a visual one
            visual = [
                range(0 if cached else min(old, end), end)
                for old, end in zip(context, ends, strict=True)
            ]
            server.step(new, context, visual, fused=draw.random() < 0.5)
            assert keys == warm, (new, [name for name, _ in keys - warm])
    names = {name for name, _ in warm}
    assert {
        "_tables_kernel",
        "_store_kernel",
        "_merge_splits_kernel",
        "_merge_parts_kernel",
        "_join_kernel",
    } < names
    assert names & {"_prefill_kernel", "_attend_kernel"}


def test_every_step_of_the_list_is_needed(cuda, keys, monkeypatch):
    """With some format, each compiles what the others do not."""
    needed, lengths = set(), set()
    for case in CASES.values():
        builder, layer = make_parts(cuda, monkeypatch, *case)
        shapes = step_shapes(MAX_REQS, MAX_TOKENS)
        lengths.add(len(shapes))
        found = []
        for shape in shapes:
            keys.clear()
            serve_empty_step(builder, [layer], shape)
            found.append(set(keys))
        for i in range(len(shapes)):
            if found[i] - set().union(*found[:i], *found[i + 1 :]):
                needed.add(i)
    assert lengths == {len(needed)}


def test_servers_of_text_compile_little(cuda, keys, monkeypatch):
    builder, layer = make_parts(cuda, monkeypatch, *CASES["1 bit"])
    warm_up(builder, {"layer": layer}, images=False)
    # Tables, store, decode; merge for few and for many requests.
    assert len(keys) == 5


@pytest.mark.parametrize(("requests", "tokens"), [(1, 2048), (256, 64), (1024, 8192), (2, 3)])
def test_steps_keep_to_the_servers_limits(requests: int, tokens: int):
    for shape in step_shapes(requests, tokens):
        assert shape.decodes + len(shape.prefills) <= requests
        assert shape.decodes + sum(shape.prefills) <= tokens
        assert min(shape.prefills, default=2) > 1


def test_groups_of_layers_share_scratch(cuda):
    def allocate(slots: int = 14) -> csrc_triton.StepTables:
        return csrc_triton.allocate_tables(
            max_num_reqs=4, max_num_blocks=8, max_num_tokens=64, slots=slots, num_kv_heads=2,
            num_sms=4, device="cpu",
        )  # fmt: skip

    engine, other = object(), object()
    scratch = cuda._shared_scratch(engine, allocate(), 8, 64, 0)
    assert cuda._shared_scratch(engine, allocate(), 8, 64, 0) is scratch
    for arguments in ((other, allocate(), 8, 64, 0), (engine, allocate(), 8, 64, 32),
                      (engine, allocate(7), 8, 64, 0)):  # fmt: skip
        assert cuda._shared_scratch(*arguments) is not scratch
    found = len(cuda._scratches)
    del scratch
    assert len(cuda._scratches) == found - 1, "scratch outlives its layers"
