"""The Gluon kernels against their twins, interpreted."""

import importlib

import pytest
import torch

from csrc_triton import decode, prefill
from tests.kernels.cases import counted_bits, make_format
from tests.kernels.gluon_interpreter import Launcher
from tests.kernels.interpreted import test_decode as decode_cases
from tests.kernels.interpreted import test_prefill as prefill_cases
from tests.kernels.interpreted import test_store as store_cases

decode_gluon = pytest.importorskip("csrc_triton.decode_gluon")
profile_gluon = pytest.importorskip("csrc_triton.profile_gluon")
prefill_gluon = pytest.importorskip("csrc_triton.prefill_gluon")
store_gluon = pytest.importorskip("csrc_triton.store_gluon")
store_profile_gluon = pytest.importorskip("csrc_triton.store_profile_gluon")
store = importlib.import_module("csrc_triton.store")  # the package has a function of this name

CALIBRATION = (0.0, 3.0)


@pytest.fixture(autouse=True)
def gluon(monkeypatch):
    monkeypatch.setattr(decode, "_decode_kernel", Launcher(decode_gluon._decode_kernel))
    profile_kernel = Launcher(profile_gluon._attend_kernel)
    monkeypatch.setattr(decode, "_profile_kernel", profile_kernel)
    monkeypatch.setattr(prefill, "_planes_kernel", profile_kernel)
    monkeypatch.setattr(decode, "gluon_serves", lambda *args: True)
    monkeypatch.setattr(prefill, "_prefill_kernel", Launcher(prefill_gluon._prefill_kernel))
    monkeypatch.setattr(prefill, "gluon_prefills", lambda *args: True)
    monkeypatch.setattr(store, "_fast_store_kernel", Launcher(store_gluon._store_kernel))
    monkeypatch.setattr(store, "_profile_store_kernel", Launcher(store_profile_gluon._store_kernel))
    monkeypatch.setattr(store, "gluon_stores", lambda *args: True)
    monkeypatch.setattr(store, "compute_capability", lambda device: (9, 0))


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
@pytest.mark.parametrize(
    ("head_size", "bits", "group"),
    [(128, 1, 7), (128, 2, 1), (128, 4, 4), (64, 1, 1), (64, 2, 12), (64, 4, 3), (128, 1, 16)],
)
def test_decode_widths(head_size, bits, group, calibration):
    fmt = make_format(head_size, bits)
    plans = decode_cases.PLANS[:3]
    decode_cases.run(
        fmt, group=group, heads=1, plans=plans, calibration=calibration, kernel="gluon"
    )


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
@pytest.mark.parametrize("case", decode_cases.PROFILES)
def test_decode_profile(case, calibration):
    *_, slots, group = decode_cases.PROFILES[case]
    fmt = make_format(*decode_cases.profile_shape(case))
    assert fmt.page.slots == slots and fmt.key_pairs is not None and fmt.value_pairs is not None
    plans = [[1, (slots, 0, slots), (3, 1, 2), 2], [2], [(slots, 2, slots - 3), (slots, 0, 5), 1]]
    decode_cases.run(
        fmt, group=group, heads=1, plans=plans, calibration=calibration, kernel="gluon", spread=2.0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["one bit", "192 + 128 planes"])
def test_decode_in_a_basis(case, dtype):
    shape = (128, 1) if case == "one bit" else decode_cases.profile_shape(case)
    fmt = make_format(*shape, dtype)
    decode_cases.run(
        fmt, group=7, heads=1, plans=decode_cases.PLANS[:2], kernel="gluon", in_basis=True
    )


@pytest.mark.parametrize("profile", [False, True])
def test_decode_of_scores_far_apart(profile):
    """All scores of some parts are more than 87 below the largest of the request."""
    bits = (counted_bits(64, 54, 32, 10), counted_bits(64, 34, 20, 10)) if profile else 1
    fmt = make_format(64, bits)
    plans = [[1, *[(fmt.page.slots, 0, fmt.page.slots)] * 3, 2]]
    decode_cases.run(
        fmt, group=3, plans=plans, calibration=CALIBRATION, kernel="gluon", sms=40, spread=40.0
    )


@pytest.mark.parametrize("sms", [1, 40])
@pytest.mark.parametrize("kept", [True, False])
def test_decode_with_one_query_head(sms, kept, monkeypatch):
    if not kept:  # too many scores to keep: the second pass reads keys again
        monkeypatch.setattr(decode, "SCORE_BYTES", 0)
    plans = [[1, (14, 0, 14), (14, 0, 9), 1], [(14, 9, 5), 1]]
    decode_cases.run(
        make_format(64), group=1, sms=sms, plans=plans, calibration=CALIBRATION, kernel="gluon"
    )


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
@pytest.mark.parametrize("bits", [1, 2, "192 + 128 planes"])
@pytest.mark.parametrize("group", [1, 4])
def test_float16_keeps_large_key_offsets(bits, group, calibration):
    shape = decode_cases.profile_shape(bits) if isinstance(bits, str) else (128, bits)
    fmt, plans = make_format(*shape, torch.float16), decode_cases.PLANS[:2]
    decode_cases.run(
        fmt, group=group, heads=1, plans=plans, calibration=calibration, kernel="gluon",
        key_bias=300.0,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2])
def test_prefill_in_float16_keeps_large_key_offsets(bits):
    prefill_cases.run_chunks(
        128, bits, 3, CALIBRATION, kernel="gluon", dtype=torch.float16, key_bias=300.0
    )


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
@pytest.mark.parametrize(
    ("head_size", "bits", "splits"), [(128, 1, None), (128, 2, 2), (64, 1, 16), (64, 4, None)]
)
def test_prefill(head_size, bits, splits, calibration):
    prefill_cases.run_chunks(head_size, bits, 7, calibration, splits=splits, kernel="gluon")


@pytest.mark.parametrize(
    ("case", "splits", "calibration", "rows"),
    [
        ("192 + 128 planes", 1, None, 16),  # 16 queries of a request at a time
        ("64 + 160 planes, 64 channels", 3, CALIBRATION, 40),  # the first two requests at once
        ("64 + 160 planes, 64 channels", 1, None, None),
    ],
)
def test_prefill_profile(case, splits, calibration, rows, monkeypatch):
    if rows:
        monkeypatch.setattr(prefill, "PART_ROWS", rows)
    prefill_cases.run_chunks(
        *decode_cases.profile_shape(case), 3, calibration, splits=splits, kernel="gluon",
        lens_known=rows is not None,
    )  # fmt: skip


def test_requests_of_similar_length_share_launches():
    assert prefill.alike([20, 60, 8192, 30, 0, 20], 1024) == [(0, 2, 60), (2, 1, 8192), (3, 3, 30)]
    assert prefill.alike([0, 16, *[16] * 1022, 2], 1024)[:2] == [(1, 64, 16), (65, 64, 16)]
    assert sum(number for _, number, _ in prefill.alike([33] * 1000, 1024)) == 1000


@pytest.mark.parametrize("name", ["1 bit, 64", "1 bit, 128", "2 bit, 64, fp16", "4 bit, 128"])
def test_store_bit_for_bit(name):
    fmt = make_format(**store_cases.FORMATS[name])
    for seed in (0, 1):
        cache, want = store_cases.run(
            fmt, store_cases.ragged_slots(fmt, seed), kernel="gluon", seed=seed
        )
        assert store_cases.differing_bits(cache, want) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", decode_cases.PROFILES)
def test_store_profile(case, dtype):
    fmt = make_format(*decode_cases.profile_shape(case), dtype)
    cache, want = store_cases.run(fmt, store_cases.ragged_slots(fmt, 2), kernel="gluon", heads=1)
    # A mean is summed in another order: it may round to the neighbouring 16-bit number.
    assert store_cases.differing_bits(cache, want) <= 8
