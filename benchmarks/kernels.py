"""Kernels beside FlashAttention 3 and xformers, in one run on one GPU.

``python -m benchmarks.kernels`` prints the table and writes a record under ``benchmarks/records``;
``--summary`` prints the ratios of the newest record of each device.

Every figure is the median of CUDA-graph replays, divided by the launches in the graph, each of
which reads the cache of another layer until more than 200 MB have been read, so that L2 is cold;
as in a model, block tables are those of the step and the same for all layers.  Decode
time is everything from the query to the written output (split, merge, and for calibration the pass
for the extremes) over visual tokens only, in full pages; FlashAttention reads the same number of
tokens from a paged bf16 or fp8 cache with block size 16, and xformers' split-k decode, which the
paper compared with, from one run of memory for each request.  Prefill is the part of a later chunk
or of a question that attends to cached visual tokens, in both formats.  The tables of a step are
made once for all layers and are timed on their own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RECORDS, newest_records, write_record
from csrc_triton import (
    DeviceFormat,
    Turns,
    allocate_scratch,
    allocate_tables,
    build_tables,
    decode_attention,
    prefill_attention,
    store,
)
from csrc_triton.attention import ATTEND, CALIBRATE, EXTREMES
from csrc_triton.decode import MAX_REGISTERS
from csrc_triton.metadata import PROGRAMS_PER_SM
from vllm_calibquant.attention.basis import Basis
from vllm_calibquant.format import PageFormat
from vllm_calibquant.profile import LayerProfile, PartProfile
from vllm_calibquant.tags import tag

BLOCK = 16
COLD_BYTES = 220e6
GOALS = {
    (28, 4, 3328, 64): (5.0, 4.0),
    (28, 4, 16384, 256): (8.0, 5.5),
    (32, 32, 3328, 64): (9.0, 7.5),
    (48, 8, 3328, 256): (6.5, 5.0),
    (28, 4, 576, 64): (3.0, 2.2),
    (32, 32, 576, 64): (3.0, 2.2),
    (48, 8, 576, 64): (3.0, 2.2),
    (28, 4, 3328, 1): (1.0, 1.0),
    (32, 32, 3328, 1): (1.0, 1.0),
    (48, 8, 3328, 1): (1.0, 1.0),
}
"""(Hq, Hkv, tokens, batch): the least ratio to FlashAttention 3 bf16, plain and calibrated."""

XFORMERS_SHAPES = ((28, 4, 3328, 64), (32, 32, 3328, 64), (48, 8, 3328, 256))
Counts = tuple[int, ...]
"""Components with more than 0, 1, 2 ... bits: what a profile gives K or V."""

VARIANTS: tuple[dict[str, Any], ...] = (
    {"shape": (28, 4, 3328, 64), "bits": 2},
    {"shape": (28, 4, 3328, 64), "bits": 4},
    {"shape": (28, 4, 3328, 64), "profile": ((104, 58, 22, 8), (34, 20, 8, 2))},
    {"shape": (28, 4, 3328, 64), "profile": ((98, 60, 26, 8), (88, 30, 10))},
    {"shape": (28, 4, 3328, 64), "profile": ((118, 80, 40, 18), (100, 28))},
    {"shape": (32, 32, 3328, 64), "bits": 2},
    {"shape": (32, 32, 3328, 64), "bits": 4},
    {"shape": (28, 4, 3328, 64), "dtype": "float16"},
    {"shape": (28, 4, 3328, 64), "d": 64},
    {"shape": (28, 4, 3328, 64), "kernel": "triton"},
)
"""Decode in other formats, and with the plain kernel that devices without Gluon use."""

PREFILLS: tuple[tuple[tuple[int, int, int, int, int], str], ...] = (
    ((28, 4, 128, 3328, 16), "bfloat16"),
    ((28, 4, 2048, 16384, 1), "bfloat16"),
    ((28, 4, 128, 3328, 16), "float16"),
    ((28, 4, 2048, 16384, 1), "float16"),
)
"""(Hq, Hkv, new tokens, cached visual tokens, requests) and the model's dtype."""

STORE_GOALS = {4: 15.0, 8: 25.0, 32: 80.0}
"""KV heads: most microseconds to store 8192 visual tokens."""


def time_us(launches: list[Callable[[], None]], replays: int = 30) -> float:
    """Median time of one of ``launches`` in microseconds, replayed as one CUDA graph."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def visual_cache(pages: int, heads: int, page: PageFormat) -> torch.Tensor:
    """A pool of visual pages with random codes and plausible ranges."""
    d = page.head_size
    cache = torch.randint(-(2**31), 2**31 - 1, (pages, heads, BLOCK, d), dtype=torch.int32,
                          device="cuda").view(page.dtype)  # fmt: skip
    flat = cache.view(pages, heads, -1)[..., page.range_offset // 2 :].view(pages, heads, 4, d)
    flat[:, :, 0::2] = 0.5 + torch.rand(d, device="cuda")
    flat[:, :, 1::2] = -0.5
    return cache


def visual_ids(tokens: int, first_page: int, slots: int) -> list[int]:
    """Tagged ids of ``tokens`` visual tokens in pages from ``first_page`` on."""
    blocks = tokens // BLOCK
    return [tag(first_page + i // slots, i % slots) for i in range(blocks)]


def num_layers(layer_bytes: int) -> int:
    """Layers to go through until L2 is cold again."""
    return max(1, min(64, -(-int(COLD_BYTES) // layer_bytes)))


class Decode:
    """Our decode attention at one shape, in as many layers as keep L2 cold.

    As in a model, all layers share the tables of the step; each has a cache of its own.
    """

    def __init__(
        self, hq: int, hkv: int, tokens: int, batch: int, d: int = 128, bits: int = 1,
        dtype: torch.dtype = torch.bfloat16, programs_per_sm: int | None = None,
        profile: tuple[Counts, Counts] | None = None,
    ) -> None:  # fmt: skip
        if profile is None:
            page = PageFormat.uniform(d, bits, dtype)
        else:
            page = PageFormat(d, *(tuple(sum(n > j for n in c) for j in range(d)) for c in profile))
        self.fmt = DeviceFormat(page, "cuda")
        per_request = -(-tokens // page.tokens)
        pages = per_request * batch
        layers = num_layers(pages * hkv * page.head_bytes)
        self.caches = [visual_cache(pages, hkv, page) for _ in range(layers)]
        self.scale = d**-0.5
        order = torch.randperm(pages).tolist()
        rows = [
            [tag(order[b * per_request + i // page.slots], i % page.slots)
             for i in range(tokens // BLOCK)] + [0]
            for b in range(batch)
        ]  # fmt: skip
        table = torch.tensor(rows, dtype=torch.int32, device="cuda")
        lens = torch.full((batch,), tokens + 1, dtype=torch.int32, device="cuda")
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        mapping = torch.full((batch,), -1, dtype=torch.int64, device="cuda")
        self.step_inputs = (table, lens, starts, mapping)
        self.tables = allocate_tables(
            max_num_reqs=batch, max_num_blocks=table.shape[1], max_num_tokens=max(batch, 32),
            slots=page.slots, num_kv_heads=hkv, device="cuda", programs_per_sm=programs_per_sm,
        )  # fmt: skip
        build_tables(self.tables, *self.step_inputs, num_decodes=batch)
        planes = 0 if profile is None else page.value_planes
        self.scratch = allocate_scratch(self.tables, hq, d, planes)
        self.query = torch.randn(batch, hq, d, dtype=page.dtype, device="cuda")
        self.out = torch.empty_like(self.query)

    def time(
        self, calibration: tuple[float, float] | None = None, kernel: str = "auto",
        basis: Turns | None = None,
    ) -> float:  # fmt: skip
        """Microseconds of one call."""

        def one(cache: torch.Tensor) -> Callable[[], None]:
            return lambda: decode_attention(
                self.tables, self.scratch, self.fmt, self.query, cache, self.out, scale=self.scale,
                calibration=calibration, kernel=kernel, basis=basis,
            )  # fmt: skip

        return time_us([one(cache) for cache in self.caches])

    def time_tables(self) -> float:
        """Microseconds of the kernel that makes a step's tables."""
        batch = self.step_inputs[1].shape[0]
        return time_us([lambda: build_tables(self.tables, *self.step_inputs, num_decodes=batch)])


def identity(heads: int, d: int, fmt: DeviceFormat) -> Turns:
    """A basis that changes nothing, which no kernel knows."""
    eye = PartProfile(
        torch.eye(d).expand(heads, d, d), torch.zeros(heads, d), (1,) * d, torch.ones(d)
    )
    basis = Basis.of(LayerProfile(eye, eye), slice(0, heads), torch.bfloat16, "cuda")
    return Turns.of(basis, fmt)


def time_flash(
    hq: int, hkv: int, tokens: int, batch: int, d: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """Microseconds of FlashAttention 3 decode as vLLM calls it: paged, its scheduler metadata."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    fp8 = dtype == torch.float8_e4m3fn
    blocks = -(-tokens // BLOCK)
    layers = num_layers(batch * blocks * BLOCK * hkv * 2 * d * dtype.itemsize)
    shape = (layers, batch * blocks, hkv, BLOCK, 2 * d)
    if fp8:
        cache = torch.randint(0, 0x60, shape, dtype=torch.uint8, device="cuda").view(dtype)
    else:
        cache = torch.empty(shape, dtype=dtype, device="cuda").normal_()
    lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    table = torch.randperm(shape[1], device="cuda").to(torch.int32).view(batch, blocks)
    extra: dict[str, Any] = {}
    if fp8:
        one = torch.ones(1, device="cuda").expand(batch, hkv)
        extra = {"q_descale": one, "k_descale": one, "v_descale": one}
    meta = get_scheduler_metadata(
        batch_size=batch, max_seqlen_q=1, max_seqlen_k=tokens, num_heads_q=hq, num_heads_kv=hkv,
        headdim=d, cache_seqlens=lens, qkv_dtype=dtype, cu_seqlens_q=starts, page_size=BLOCK,
        causal=True,
    )  # fmt: skip
    query = torch.randn(batch, hq, d, device="cuda").to(dtype)
    out = torch.empty(batch, hq, d, dtype=torch.bfloat16 if fp8 else dtype, device="cuda")

    def one(layer: torch.Tensor) -> Callable[[], None]:
        key, value = layer.transpose(1, 2).split(d, -1)
        return lambda: flash_attn_varlen_func(
            query, key, value, 1, starts, tokens, seqused_k=lens, softmax_scale=d**-0.5,
            causal=True, block_table=table, out=out, scheduler_metadata=meta, fa_version=3, **extra,
        )  # fmt: skip

    return time_us([one(layer) for layer in cache])


def time_xformers(hq: int, hkv: int, tokens: int, batch: int, d: int = 128) -> float:
    """Microseconds of xformers' split-k decode in bf16, with its own choice of splits."""
    from xformers.ops.fmha import (
        attn_bias,
        common,
        memory_efficient_attention_forward,
        triton_splitk,
    )

    # This kernel is in Triton; xformers' compiled library is for one version of PyTorch only.
    common._built_with_cuda = True
    layers = num_layers(batch * tokens * hkv * 2 * d * 2)
    cache = torch.empty(
        layers, 2, 1, batch * tokens, hkv, 1, d, dtype=torch.bfloat16, device="cuda"
    )
    cache.normal_()
    bias = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch, kv_padding=tokens, kv_seqlen=[tokens] * batch, device="cuda"
    )
    query = torch.randn(1, batch, hkv, hq // hkv, d, device="cuda").bfloat16()

    def one(key: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
        k, v = (x.expand(-1, -1, -1, hq // hkv, -1) for x in (key, value))
        return lambda: memory_efficient_attention_forward(
            query, k, v, bias, op=triton_splitk.FwOp
        )  # fmt: skip

    return time_us([one(*layer) for layer in cache])


def time_prefill(
    hq: int, hkv: int, queries: int, tokens: int, batch: int, d: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[float, float]:  # fmt: skip
    """Microseconds of new tokens over cached visual tokens, all of which they see.

    Returns the times without and with calibration.
    """
    page = PageFormat.uniform(d, 1, dtype)
    fmt = DeviceFormat(page, "cuda")
    per_request = -(-tokens // page.tokens)
    cache = visual_cache(per_request * batch, hkv, page)
    rows = [visual_ids(tokens, b * per_request, page.slots) + [0] * (-(-queries // BLOCK))
            for b in range(batch)]  # fmt: skip
    table = torch.tensor(rows, dtype=torch.int32, device="cuda")
    tables = allocate_tables(
        max_num_reqs=batch, max_num_blocks=table.shape[1], max_num_tokens=batch * queries,
        slots=page.slots, num_kv_heads=hkv, device="cuda",
    )  # fmt: skip
    lens = torch.full((batch,), tokens + queries, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * queries
    mapping = torch.full((batch * queries,), -1, dtype=torch.int64, device="cuda")
    build_tables(tables, table, lens, starts, mapping, num_decodes=0)
    query = torch.randn(batch * queries, hq, d, device="cuda", dtype=dtype)
    out, lse = torch.empty_like(query), torch.empty(hq, batch * queries, device="cuda")

    def time(calibration: tuple[float, float] | None) -> float:
        def launch() -> None:
            prefill_attention(
                tables, fmt, query, cache, starts, out, lse, first_request=0, num_requests=batch,
                max_query_len=queries, scale=d**-0.5, calibration=calibration,
            )  # fmt: skip

        return time_us([launch], replays=10)

    return time(None), time((0.0, 3.0))


def time_flash_prefill(
    hq: int, hkv: int, queries: int, tokens: int, batch: int, d: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """Microseconds of FlashAttention 3 for the same, over pages of ``dtype``."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    blocks = batch * tokens // BLOCK
    cache = torch.empty(blocks, hkv, BLOCK, 2 * d, dtype=dtype, device="cuda").normal_()
    key, value = cache.transpose(1, 2).split(d, -1)
    table = torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)
    lens = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * queries
    query = torch.randn(batch * queries, hq, d, device="cuda", dtype=dtype)
    out = torch.empty_like(query)

    def launch() -> None:
        flash_attn_varlen_func(
            query, key, value, queries, starts, tokens, seqused_k=lens, softmax_scale=d**-0.5,
            causal=False, block_table=table, out=out, fa_version=3,
        )  # fmt: skip

    return time_us([launch], replays=10)


def time_store(hkv: int, tokens: int = 8192, d: int = 128, bits: int = 1) -> float:
    """Microseconds to store ``tokens`` visual tokens, K and V, in full pages."""
    page = PageFormat.uniform(d, bits)
    fmt = DeviceFormat(page, "cuda")
    pages = -(-tokens // page.tokens)
    set_bytes = tokens * hkv * 2 * d * 2
    sets = max(2, -(-int(COLD_BYTES) // set_bytes))
    cache = torch.zeros(pages * sets, hkv, BLOCK, 2 * d, dtype=page.dtype, device="cuda")
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    launches = []
    for s in range(sets):
        ids = torch.tensor(visual_ids(tokens, s * pages, page.slots), device="cuda")
        mapping = (ids[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
        tables = allocate_tables(max_num_reqs=1, max_num_blocks=1, max_num_tokens=tokens,
                                 slots=page.slots, num_kv_heads=hkv, device="cuda")  # fmt: skip
        row = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
        build_tables(tables, row, one, starts, mapping, num_decodes=0)  # fmt: skip
        key, value = torch.randn(2, tokens, hkv, d, device="cuda", dtype=page.dtype)

        def launch(t: Any = tables, k: Any = key, v: Any = value, m: Any = mapping) -> None:
            store(t, fmt, k, v, cache, m)

        launches.append(launch)
    return time_us(launches)


def xformers_version() -> str:
    """Version of xformers.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    import xformers

    return xformers.__version__


def measure(shapes: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    """All rows of the table."""
    try:
        xformers, competitor = xformers_version(), True
    except ImportError as error:
        xformers, competitor = f"not measured: {error}", False
    rows = []
    for shape in shapes:
        row: dict[str, Any] = {"shape": shape, "fa3_bf16_us": time_flash(*shape)}
        torch.cuda.empty_cache()
        try:
            row["fa3_fp8_us"] = time_flash(*shape, dtype=torch.float8_e4m3fn)
        except RuntimeError as error:
            row["fa3_fp8_us"], row["fa3_fp8_error"] = None, str(error)[:200]
        torch.cuda.empty_cache()
        if competitor and shape in XFORMERS_SHAPES:
            try:
                row["xformers_us"] = time_xformers(*shape)
            except Exception as error:  # whatever it does not support here
                row["xformers_error"] = f"{type(error).__name__}: {error}"[:2000]
            torch.cuda.empty_cache()
        decode = Decode(*shape)
        row["plain_us"] = decode.time()
        row["calibrated_us"] = decode.time((0.0, 3.0))
        row["tables_us"] = decode.time_tables()
        del decode
        torch.cuda.empty_cache()
        rows.append(row)
        print(format_row(row), flush=True)
    wide = [measure_variant(**variant) for variant in VARIANTS]
    prefill = []
    for prefill_shape, dtype in PREFILLS:
        flash = time_flash_prefill(*prefill_shape, dtype=getattr(torch, dtype))
        plain, calibrated = time_prefill(*prefill_shape, dtype=getattr(torch, dtype))
        torch.cuda.empty_cache()
        row = {"shape": prefill_shape, "dtype": dtype, "fa3_16bit_us": flash, "plain_us": plain,
               "calibrated_us": calibrated}  # fmt: skip
        prefill.append(row)
        print(f"prefill {name(prefill_shape)}, {dtype}  FA3 {flash:.0f}  plain {plain:.0f}  "
              f"calibrated {calibrated:.0f} us", flush=True)  # fmt: skip
    stores = {hkv: time_store(hkv) for hkv in STORE_GOALS}
    for hkv, us in stores.items():
        read = 8192 * hkv * 2 * 128 * 2
        print(f"store of 8192 visual tokens, Hkv {hkv}: {us:.1f} us (goal {STORE_GOALS[hkv]:.0f}), "
              f"{read / us / 1e6:.2f} TB/s read")  # fmt: skip
    store_bits = {bits: time_store(8, bits=bits) for bits in (2, 4)}
    return {"decode": rows, "wide": wide, "prefill": prefill, "store_us": stores,
            "store_hkv8_us_by_bits": store_bits, "xformers": xformers}  # fmt: skip


def measure_variant(
    shape: tuple[int, int, int, int], bits: int = 1, d: int = 128, dtype: str = "bfloat16",
    kernel: str = "auto", profile: tuple[Counts, Counts] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Decode in one of the other formats, with FlashAttention 3 over the same shape.

    A profile comes with a basis, which takes two launches more.
    """
    model = getattr(torch, dtype)
    average = bits if profile is None else sum(map(sum, profile)) / (2 * d)
    row: dict[str, Any] = {"shape": shape, "bits": average, "profile": profile, "head_size": d,
                           "dtype": dtype, "kernel": kernel}  # fmt: skip
    row["fa3_16bit_us"] = time_flash(*shape, d, model)
    row["fa3_fp8_us"] = time_flash(*shape, d, torch.float8_e4m3fn)
    decode = Decode(*shape, d, bits, model, profile=profile)
    basis = None if profile is None else identity(shape[1], d, decode.fmt)
    row["plain_us"] = decode.time(kernel=kernel, basis=basis)
    row["calibrated_us"] = decode.time((0.0, 3.0), kernel=kernel, basis=basis)
    del decode
    torch.cuda.empty_cache()
    print(
        f"{name(shape):>18}  {average:g} bit, D {d}, {dtype}, {kernel}: "
        f"FA3 {row['fa3_16bit_us']:.1f}  fp8 {row['fa3_fp8_us']:.1f}  plain {row['plain_us']:.1f}  "
        f"calibrated {row['calibrated_us']:.1f} us",
        flush=True,
    )
    return row


def name(shape: tuple[int, ...] | list[int]) -> str:
    """``HqxHkvxtokensxbatch``."""
    return "x".join(map(str, shape))


def format_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    plain, calibrated = (row["fa3_bf16_us"] / row[k] for k in ("plain_us", "calibrated_us"))
    goals = GOALS.get(tuple(row["shape"]), (0.0, 0.0))
    fp8 = row["fa3_fp8_us"]
    return (
        f"{name(row['shape']):>18}  FA3 bf16 {row['fa3_bf16_us']:8.1f}  fp8 "
        + (f"{fp8:8.1f}" if fp8 else "       -")
        + (f"  xformers {row['xformers_us']:.1f}" if "xformers_us" in row else "")
        + f"  plain {row['plain_us']:7.1f} ({plain:4.1f}x, goal {goals[0]:.1f})"
        + f"  calibrated {row['calibrated_us']:7.1f} ({calibrated:4.1f}x, goal {goals[1]:.1f})"
        + f"  tables {row['tables_us']:.1f} us"
    )


def print_summary(record: dict[str, Any]) -> None:
    """Device, ratios to FlashAttention 3 bf16, one a line, and store times."""
    print(f"{record['device']}, {record['date'][:10]}")
    for kind in ("plain", "calibrated"):
        for row in record["decode"]:
            print(f"{kind} {name(row['shape'])} {row['fa3_bf16_us'] / row[f'{kind}_us']:.1f}")
    for hkv, us in record["store_us"].items():
        print(f"store {hkv} {us:.0f}us")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--summary", action="store_true", help="print the newest records' ratios")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    args = parser.parse_args()
    if args.summary:
        for record in newest_records("kernels").values():
            print_summary(record)
        return
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --summary prints the newest record")
    settings = {
        "programs_per_sm": PROGRAMS_PER_SM,
        "max_registers": {
            "attend": MAX_REGISTERS[ATTEND],
            "extremes": MAX_REGISTERS[EXTREMES],
            "calibrate": MAX_REGISTERS[CALIBRATE],
        },
    }
    record = {"settings": settings, **measure(list(GOALS))}
    write_record("kernels", record, args.out)
    print_summary(record)


if __name__ == "__main__":
    main()
