"""Every kernel compiled ahead for sm_80 and sm_90, which needs no GPU; the code is counted."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from csrc_triton import attention, basis, decode, join, merge, metadata, prefill
from csrc_triton.store import (
    PROFILE_REGISTERS,
    STORE_REGISTERS,
    _store_kernel,
    block_constants,
    gluon_constants,
    profile_constants,
)
from csrc_triton.tables import next_power_of_2, pipeline_stages
from tests.kernels.cases import make_format
from tests.kernels.interpreted import test_decode

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted functions cannot be compiled"
)

TARGETS = [80, 90]
POINTERS = {
    "p_q": "bf16", "p_cache": "bf16", "p_key": "bf16", "p_value": "bf16", "p_text": "bf16",
    "p_a": "bf16", "p_b": "bf16", "p_c": "bf16", "p_out": "fp32", "p_lse": "fp32", "p_low": "fp32",
    "p_high": "fp32",
    "p_scores": "fp32", "p_part": "fp32", "p_part_lse": "fp32", "p_text_lse": "fp32",
    "p_a_lse": "fp32",
    "p_b_lse": "fp32", "p_c_lse": "fp32", "p_key_clip": "fp32", "p_value_clip": "fp32",
    "p_key_mix": "fp32", "p_value_mix": "fp32",
    "p_key_levels": "fp32", "p_value_levels": "fp32", "p_slot_mapping": "i64",
    "p_planes": "bf16", "p_spread": "bf16", "p_scratch": "u8",
    "p_inverse": "fp32", "p_mean": "fp32", "p_turned": "bf16", "p_shift": "fp32",
    "p_codes": "fp32", "p_keys": "bf16", "p_values": "bf16",
}  # fmt: skip
FLOATS = {"scale", "tau_min", "tau_max", "alpha"}


def compile_kernel(kernel, constants, capability, source=ASTSource, aligned=(), **options):
    names = kernel.arg_names
    signature = {}
    for n in names:
        if n in constants:
            signature[n] = "constexpr"
        elif n.startswith("p_"):
            signature[n] = "*" + POINTERS.get(n, "i32")
        else:
            signature[n] = "fp32" if n in FLOATS else "i32"
    aligned = ("p_", "stride_page", "stride_head", *aligned)
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and n.startswith(aligned)
    }
    places = {(names.index(k),): v for k, v in constants.items()}
    return triton.compile(
        source(kernel, signature, places, hints),
        target=GPUTarget("cuda", capability, 32), options=options,
    )  # fmt: skip


def page_constants(fmt):
    page = fmt.page
    return {
        "KEY_PLANES": page.key_planes, "VALUE_PLANES": page.value_planes, "SLOTS": page.slots,
        "RANGE_OFFSET": page.range_offset // 2,
    }  # fmt: skip


@pytest.mark.parametrize("capability", TARGETS)
def test_metadata(capability):
    constants = {"PAGE_TOKENS": 224, "BC": 1024}
    compile_kernel(metadata._tables_kernel, constants, capability, num_warps=4)


@pytest.mark.parametrize(
    ("capability", "quantile", "head_size", "bits"), [(80, True, 80, 2), (90, False, 128, 1)]
)
def test_store(capability, quantile, head_size, bits):
    fmt = make_format(head_size, bits)
    constants = page_constants(fmt) | block_constants(fmt, quantile=quantile)
    compile_kernel(_store_kernel, constants, capability, num_warps=8, enable_fp_fusion=False)


@pytest.mark.parametrize(
    ("capability", "head_size", "bits"), [(90, 128, 1), (90, 64, 4), (80, 64, 1), (80, 128, 2)]
)
def test_gluon_store(capability, head_size, bits, tmp_path):
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    from csrc_triton.store_gluon import _store_kernel

    constants = gluon_constants(make_format(head_size, bits)) | {
        "BR": 32,
        "HOPPER": capability >= 90,
    }
    limit = {"maxnreg": STORE_REGISTERS} if bits == 1 else {}
    compiled = compile_kernel(
        _store_kernel, constants, capability, gluon.GluonASTSource, ("stride_",),
        num_warps=constants["NUM_WARPS"], enable_fp_fusion=False, **limit,
    )  # fmt: skip
    assert 3 * (compiled.metadata.shared + 1024) <= 227 * 1024, "three programs a multiprocessor"
    sass = disassembly(compiled, tmp_path)
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("LDGSTS", "MOVM", "LDL", "STL")}
    words = head_size // 2
    assert count["LDGSTS"] == words // 4, "16 bytes a copy"
    assert count["MOVM"] == 4 * bits
    # Some versions keep invariants of the loop over pages in local memory, but no data.
    assert count["LDL"] + count["STL"] < 64, "registers spill to local memory"
    if bits == 1:  # a comparison and a LOP3 take two channels of a token
        compare = "HSET2" if capability >= 90 else r"HFMA2"
        assert len(re.findall(rf"\b{compare}\b", sass)) == words
        assert len(re.findall(r"\bLOP3\b", sass)) < words + 160


def test_gluon_profile_store(tmp_path):
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    from csrc_triton.store_profile_gluon import _store_kernel

    shape = test_decode.profile_shape("64 + 160 planes, 64 channels")
    constants = profile_constants(make_format(*shape))
    compiled = compile_kernel(
        _store_kernel, constants, 90, gluon.GluonASTSource, ("stride_",),
        num_warps=constants["NUM_WARPS"], enable_fp_fusion=False, maxnreg=PROFILE_REGISTERS,
    )  # fmt: skip
    assert 3 * (compiled.metadata.shared + 1024) <= 227 * 1024, "three programs a multiprocessor"
    sass = disassembly(compiled, tmp_path)
    words = re.findall(r"\bMOVM\b", sass)
    assert len(words) == 2 * 4, "a word of V for each piece and token group"
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) < 256, "registers spill to local memory"


SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, by capability."""


@pytest.mark.parametrize(
    ("capability", "mode", "prefill", "head_size"),
    [
        (80, attention.ATTEND, False, 128),
        (86, attention.CALIBRATE, True, 80),
        (86, attention.ATTEND, True, 112),
        (90, attention.EXTREMES, False, 80),
        (90, attention.CALIBRATE, True, 96),
        (90, attention.CALIBRATE, True, 128),
    ],
)
def test_attention(capability, mode, prefill, head_size, monkeypatch):
    monkeypatch.setattr("csrc_triton.tables.shared_memory", lambda device: SHARED[capability])
    constants = page_constants(make_format(head_size)) | {
        "D": head_size, "BD": 128, "GROUP": 7, "BM": 64 if prefill else 16, "BT": 64,
        "KEY_BITS": 1, "VALUE_BITS": 1, "MODE": mode, "DECODE": not prefill,
        "DOT": triton.language.bfloat16, "WHOLE": head_size == 128, "HALF": 8,
    }  # fmt: skip
    stages = pipeline_stages(make_format(head_size), torch.device("cpu"))
    assert stages == (1 if head_size != 128 and capability < 90 else 3)
    compiled = compile_kernel(
        attention._attend_kernel, constants, capability, num_warps=4, num_stages=stages
    )
    assert compiled.metadata.shared <= SHARED[capability]


def test_merge():
    splits = {"NUM_HEADS": 28, "BH": 4, "D": 80, "BD": 128, "HAS_TEXT": True, "HAS_LSE": True,
              "BI": 8, "PDL": False, "TURNED": False, "PLANES": 0, "BITS": 0,
              "BP": 128}  # fmt: skip
    compile_kernel(merge._merge_splits_kernel, splits, 80, num_warps=1)
    planes = {"BH": 1, "D": 128, "PLANES": 160, "BITS": 3, "BP": 512}
    compile_kernel(merge._merge_splits_kernel, splits | planes, 80, num_warps=2)
    decode_only = ("HAS_LSE", "BI", "PDL", "TURNED")
    shares = {k: v for k, v in splits.items() if k not in decode_only} | {"BS": 4}
    compile_kernel(prefill._merge_kernel, shares, 80, num_warps=1)
    compile_kernel(prefill._merge_kernel, shares | planes | {"BS": 16}, 80, num_warps=4)
    turned = {"GROUP": 7, "D": 80, "BD": 128, "BM": basis.ROWS, "BN": basis.COLUMNS}
    spread = {"NUM_HEADS": 28, "PLANES": 0, "PDL": False}
    compile_kernel(basis._turn_query_kernel, turned | spread, 80, num_warps=2)
    many = {"BM": basis.MANY_ROWS}
    compile_kernel(basis._turn_query_kernel, turned | spread | many, 80, num_warps=4)
    with pytest.MonkeyPatch.context() as patch:  # planes are bfloat16 in every model
        patch.setitem(POINTERS, "p_q", "fp16")
        patch.setitem(POINTERS, "p_turned", "fp16")
        spread |= {"D": 128, "PLANES": 160}
        compile_kernel(basis._turn_query_kernel, turned | spread, 80, num_warps=2)
    turned |= {"HAS_TEXT": True, "HAS_LSE": True, "PDL": False}
    compile_kernel(basis._merge_turned_kernel, turned, 80, num_warps=2)
    compile_kernel(basis._merge_turned_kernel, turned | many, 80, num_warps=4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_encode(head_size, capability, dtype, monkeypatch):
    for name in ("key", "value"):
        for what in ("", "_forward", "_shift", "_out"):
            monkeypatch.setitem(POINTERS, f"p_{name}{what}", dtype)
    constants = {"NUM_HEADS": 4, "D": head_size, "BD": next_power_of_2(head_size),
                 "BM": basis.ENCODED_ROWS, "BN": basis.ENCODED_COLUMNS}  # fmt: skip
    compiled = compile_kernel(basis._encode_kernel, constants, capability, num_warps=4)
    assert compiled.metadata.shared <= SHARED[capability]


def test_join():
    constants = {"HEADS": 4, "D": 80, "BD": 128, "BR": join.ROWS, "BN": join.MAX_REQUESTS,
                 "BLOCK": join.BLOCK}  # fmt: skip
    compile_kernel(join._join_kernel, constants, 80, num_warps=4)


def test_dependent_launches(tmp_path):
    turned = {"GROUP": 7, "D": 128, "BD": 128, "BM": basis.ROWS, "BN": basis.COLUMNS, "PDL": True}
    spread = {"NUM_HEADS": 28, "PLANES": 160}
    merged = {"HAS_TEXT": True, "HAS_LSE": False}
    splits = {"NUM_HEADS": 28, "BH": 1, "D": 128, "BD": 128, "HAS_TEXT": False, "HAS_LSE": True,
              "BI": 8, "PDL": True, "TURNED": True, "PLANES": 160, "BITS": 3,
              "BP": 512}  # fmt: skip
    for kernel, constants, begins, waits in (
        (basis._turn_query_kernel, turned | spread, True, False),
        (merge._merge_splits_kernel, splits, True, True),
        (basis._merge_turned_kernel, turned | merged, False, True),
    ):
        compiled = compile_kernel(kernel, constants, 90, num_warps=2, launch_pdl=waits)
        sass = disassembly(compiled, tmp_path)
        assert ("PREEXIT" in sass, "ACQBULK" in sass) == (begins, waits)
    parts = {"D": 80, "BD": 128, "PARTS": 3}
    compile_kernel(merge._merge_parts_kernel, parts, 80, num_warps=1)


@pytest.mark.parametrize(
    ("bits", "types"),
    [
        (1, {}),
        (1, {"p_out": "bf16"}),
        (2, {}),
        (4, {}),
    ],
)
@pytest.mark.parametrize("mode", [attention.ATTEND, attention.EXTREMES, attention.CALIBRATE])
def test_hopper_prefill(mode, bits, types, tmp_path, monkeypatch):
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    from csrc_triton.prefill import HOPPER_REGISTERS
    from csrc_triton.prefill_hopper import _hopper_kernel

    for name, dtype in types.items():
        monkeypatch.setitem(POINTERS, name, dtype)
    page = make_format(128, bits).page
    constants = {
        "BITS": bits, "SLOTS": page.slots, "RANGE_OFFSET": page.range_offset // 2, "MODE": mode,
    }  # fmt: skip
    compiled = compile_kernel(
        _hopper_kernel, constants, 90, gluon.GluonASTSource, ("stride_q", "stride_o"),
        num_warps=4, maxnreg=HOPPER_REGISTERS,
    )  # fmt: skip
    assert 3 * (compiled.metadata.shared + 1024) <= 227 * 1024, "three programs a multiprocessor"
    sass = disassembly(compiled, tmp_path)
    products = len(re.findall(r"\bHGMMA\.", sass))
    groups = {14: 4, 7: 3, 3: 2}[page.slots]
    steps = 8 * groups + (mode != attention.EXTREMES) * page.slots
    assert products == steps
    waits = len(re.findall(r"\bWARPGROUP\.DEPBAR", sass))
    assert waits <= 2 * groups, "products wait for each other"
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) < 400, "registers spill to local memory"


def disassembly(compiled, tmp_path: Path) -> str:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = [str(tool), "-sass", str(path)]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("capability", "mode", "group", "head_size", "bits", "dtype"),
    [
        (90, attention.ATTEND, 7, 128, 1, "bf16"),
        (90, attention.EXTREMES, 7, 128, 1, "bf16"),
        (90, attention.CALIBRATE, 7, 128, 1, "bf16"),
        (90, attention.ATTEND, 16, 128, 1, "bf16"),
        (90, attention.ATTEND, 8, 128, 2, "bf16"),
        (90, attention.ATTEND, 1, 128, 4, "bf16"),
        (90, attention.CALIBRATE, 1, 128, 1, "bf16"),
        (90, attention.CALIBRATE, 4, 64, 1, "bf16"),
        (90, attention.ATTEND, 4, 64, 2, "bf16"),
        (80, attention.ATTEND, 7, 128, 1, "bf16"),
        (90, attention.ATTEND, 7, 128, 1, "fp16"),
        (80, attention.CALIBRATE, 7, 128, 1, "fp16"),
    ],
)
def test_gluon_decode(capability, mode, group, head_size, bits, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(POINTERS, "p_q", dtype)
    monkeypatch.setitem(POINTERS, "p_cache", dtype)
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    from csrc_triton.decode_gluon import _decode_kernel

    fmt = make_format(head_size, bits)
    slots, wide = fmt.page.slots, group > 8
    constants = {
        "NUM_HEADS": 4 * group, "GROUP": group, "N": 16 if wide else 8, "D": head_size,
        "BITS": bits,
        "SLOTS": slots, "RANGE_OFFSET": fmt.page.range_offset // 2,
        "HALF": metadata.half_slots(slots), "MODE": mode, "PDL": capability >= 90,
        "TURNED": capability >= 90 and head_size == 64,
    }  # fmt: skip
    compiled = compile_kernel(
        _decode_kernel, constants, capability, gluon.GluonASTSource, num_warps=1,
        maxnreg=decode.max_registers(mode, group),
    )  # fmt: skip
    stages = 2 if mode == attention.EXTREMES else 3
    assert compiled.metadata.shared == stages * 32 * head_size, "shared memory is the ring alone"
    sass = disassembly(compiled, tmp_path)
    products = len(re.findall(r"\bHMMA\.16816\.F32\.BF16", sass))
    exact = len(re.findall(r"\bHMMA\.16816\.F32 ", sass))
    steps = head_size // 16
    assert exact == (0 if dtype == "bf16" else steps), "key offsets as the model has them"
    products += exact
    parts = 1 if mode == attention.EXTREMES else 2
    signs = 1 if head_size == 128 else 0  # what the last bit of a half-word needs
    assert products == (2 if wide else 1) * (steps * (1 + parts * slots * bits) + signs)
    # An A register holds two codes and takes one LOP3: four for a product of 16 tokens x 16
    # channels.
    assert len(re.findall(r"\bLOP3\b", sass)) < 4 * steps * parts * slots * bits + 100
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    most = 256 if wide else 32 if dtype == "bf16" else 64  # in fp16 the query is kept twice
    assert spills < most, "registers spill to local memory"


@pytest.mark.parametrize(
    ("capability", "mode", "case", "prefill"),
    [
        (90, attention.ATTEND, "192 + 128 planes", False),
        (80, attention.CALIBRATE, "64 + 160 planes, 64 channels", True),
    ],
)
def test_gluon_profile(capability, mode, case, prefill, tmp_path):
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    from csrc_triton.profile_gluon import _attend_kernel

    head_size, _, _, slots, group = test_decode.PROFILES[case]
    page = make_format(*test_decode.profile_shape(case)).page
    constants = {
        "NUM_HEADS": 4 * group, "GROUP": group, "D": head_size,
        "KEY_PLANES": page.key_planes, "VALUE_PLANES": page.value_planes, "SLOTS": slots,
        "RANGE_OFFSET": page.range_offset // 2, "HALF": metadata.half_slots(slots), "MODE": mode,
        "DECODE": not prefill, "PDL": capability >= 90, "WAITS": capability >= 90,
    }  # fmt: skip
    compiled = compile_kernel(
        _attend_kernel, constants, capability, gluon.GluonASTSource, ("stride_q",), num_warps=1,
        maxnreg=decode.MAX_REGISTERS[mode],
    )  # fmt: skip
    assert compiled.metadata.shared + 1024 <= 227 * 1024 // 11, "eleven warps a multiprocessor"
    sass = disassembly(compiled, tmp_path)
    products = len(re.findall(r"\bHMMA\.16816\.F32\.BF16", sass))
    planes = page.key_planes + (mode != attention.EXTREMES) * page.value_planes
    signs = page.key_planes // 128  # what the last bits of half-words need
    assert products == head_size // 16 + signs + slots * planes // 16
    assert len(re.findall(r"\bLOP3\b", sass)) < slots * planes // 4 + 150
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) < 64, "registers spill to local memory"


@pytest.mark.parametrize(
    ("capability", "mode", "head_size", "bits"),
    [
        (90, attention.ATTEND, 128, 1),
        (90, attention.CALIBRATE, 64, 4),
        (80, attention.EXTREMES, 128, 2),
    ],
)
def test_gluon_prefill(capability, mode, head_size, bits, tmp_path):
    gluon = pytest.importorskip("triton.experimental.gluon._runtime")
    from csrc_triton.prefill_gluon import _prefill_kernel

    page = make_format(head_size, bits).page
    constants = {
        "GROUP": 7, "D": head_size, "BITS": bits, "SLOTS": page.slots,
        "RANGE_OFFSET": page.range_offset // 2, "MODE": mode,
    }  # fmt: skip
    compiled = compile_kernel(
        _prefill_kernel, constants, capability, gluon.GluonASTSource, ("stride_",), num_warps=1
    )
    sass = disassembly(compiled, tmp_path)
    products = len(re.findall(r"\bHMMA\.16816\.F32\.BF16", sass))
    steps, parts = head_size // 16, 1 if mode == attention.EXTREMES else 2
    signs = 2 if head_size == 128 else 0  # what the last bit of a half-word needs
    assert products == 2 * steps * (1 + parts * page.slots * bits) + signs
    assert len(re.findall(r"\b(?:LDL|STL)\b", sass)) < 200, "registers spill to local memory"
