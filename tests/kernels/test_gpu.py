"""The kernels on a GPU, compiled, against the same float64 twins."""

import itertools
import sys

import pytest
import torch

from csrc_triton import DeviceFormat
from tests.kernels.cases import make_format
from tests.kernels.interpreted import (
    test_basis,
    test_decode,
    test_join,
    test_prefill,
    test_store,
)
from vllm_calibquant.format import PageFormat

pytestmark = pytest.mark.gpu

LONG = [
    [1, (14, 0, 14), (14, 0, 14), (9, 0, 9), 2],
    [2],
    [1, (14, 5, 9), (14, 0, 14), 1, (6, 2, 3), (14, 0, 1), 1],
    [1, *[(14, 0, 14)] * 7, 1],
]


@pytest.mark.parametrize("kernel", ["triton", "gluon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("group", [1, 7, 12])
@pytest.mark.parametrize("sms", [1, 9])
def test_decode_one_bit(kernel, dtype, calibration, group, sms):
    test_decode.run(make_format(128, 1, dtype), group=group, plans=LONG, calibration=calibration,
                    spread=2.0, kernel=kernel, device="cuda", sms=sms)  # fmt: skip


@pytest.mark.parametrize("kernel", ["triton", "gluon"])
@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("bits", [1, 2, "192 + 128 planes"])
@pytest.mark.parametrize("group", [1, 7])
def test_float16_keeps_large_key_offsets(kernel, calibration, bits, group):
    shape = test_decode.profile_shape(bits) if isinstance(bits, str) else (128, bits)
    fmt, plans = make_format(*shape, torch.float16), test_decode.PLANS
    test_decode.run(fmt, group=group, plans=plans, calibration=calibration, kernel=kernel,
                    device="cuda", key_bias=300.0)  # fmt: skip


@pytest.mark.parametrize("kernel", ["triton", "auto"])
@pytest.mark.parametrize("bits", [1, 2])
def test_prefill_in_float16_keeps_large_key_offsets(kernel, bits):
    test_prefill.run_chunks(
        128, bits, 7, (0.0, 3.0), device="cuda", kernel=kernel, dtype=torch.float16, key_bias=300.0
    )


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_narrow_and_wide_scores(calibration, spread):
    test_decode.run(make_format(128), group=4, plans=LONG, calibration=calibration, spread=spread,
                    kernel="gluon", device="cuda")  # fmt: skip


@pytest.mark.parametrize("head_size", [64, 80, 96, 112, 256])
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
def test_decode_head_sizes(head_size, bits, calibration):
    test_decode.run(make_format(head_size, bits), group=5, plans=LONG, calibration=calibration,
                    kernel="auto", device="cuda")  # fmt: skip


@pytest.mark.parametrize(
    "bits", [2, 4, ((3, 2, 1, 0) * 32, (1, 0, 1, 0) * 32)], ids=["2", "4", "mixed"]
)
@pytest.mark.parametrize("group", [1, 8, 16])
def test_decode_widths(bits, group):
    test_decode.run(make_format(128, bits), group=group, plans=LONG, calibration=(0.0, 3.0),
                    kernel="auto", device="cuda")  # fmt: skip


@pytest.mark.parametrize("kernel", ["triton", "gluon"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("group", [1, 7])
def test_decode_one_width_in_a_basis(kernel, bits, calibration, group):
    test_decode.run(make_format(128, bits), group=group, plans=LONG, calibration=calibration,
                    kernel=kernel, device="cuda", in_basis=True)  # fmt: skip


@pytest.mark.parametrize("in_basis", [False, True])
@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("sms", [1, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
@pytest.mark.parametrize("case", test_decode.PROFILES)
def test_decode_profile(case, kernel, dtype, sms, calibration, in_basis):
    *_, group = test_decode.PROFILES[case]
    test_decode.run(make_format(*test_decode.profile_shape(case), dtype), group=group, plans=LONG,
                    calibration=calibration, spread=2.0, kernel=kernel, device="cuda",
                    sms=sms, in_basis=in_basis)  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_size", "bits"), itertools.product((64, 128), (1, 2, 4)))
def test_store_is_that_of_pytorch_bit_for_bit(head_size, bits, dtype, kernel, seed):
    fmt = make_format(head_size, bits, dtype)
    slots = test_store.ragged_slots(fmt, seed)
    got, want = test_store.run(fmt, slots, device="cuda", kernel=kernel, seed=seed)
    assert test_store.differing_bits(got, want) == 0


@pytest.mark.parametrize("programs", [1, 100, 4096])
def test_store_heads_of_a_text_program(programs, monkeypatch):
    """One copies rows of all heads, of some, or of one."""
    module = sys.modules["csrc_triton.store"]  # the package has a function of that name
    monkeypatch.setattr(module, "TEXT_PROGRAMS", programs)
    fmt = make_format(128, 1)
    slots = test_store.ragged_slots(fmt, 0)
    got, want = test_store.run(fmt, slots, heads=5, device="cuda", kernel="gluon")
    assert test_store.differing_bits(got, want) == 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", test_decode.PROFILES)
def test_store_profile(case, dtype, kernel, seed):
    fmt = make_format(*test_decode.profile_shape(case), dtype)
    slots = test_store.ragged_slots(fmt, seed)
    got, want = test_store.run(fmt, slots, device="cuda", kernel=kernel, seed=seed)
    # A mean is summed in another order: it may round to the neighbouring 16-bit number.
    assert test_store.differing_bits(got, want) <= 40


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("middle", [False, True])
def test_store_range_of_each_component(bits, middle):
    clip = (0.2, 0.5, 0.9, 1.0) * 32  # 0.5: a constant channel lies far from its range
    weights = test_store.shrunk(clip) if middle else (clip, 0.0)
    fmt = DeviceFormat(PageFormat.uniform(128, bits), "cpu", *(w for w in weights for _ in "kv"))
    slots = test_store.ragged_slots(fmt, 3)
    got, want = test_store.run(fmt, slots, device="cuda", kernel="gluon")
    assert test_store.differing_bits(got, want) == 0


@pytest.mark.parametrize("name", ["1 bit", "per component"])
@pytest.mark.parametrize("head_size", [80, 96, 112, 256])
def test_store_generic(name, head_size):
    bits = ((3, 2, 1, 0) * (head_size // 4), (1, 0, 1, 0) * (head_size // 4))
    fmt = make_format(head_size, bits if name == "per component" else 1)
    got, want = test_store.run(fmt, test_store.ragged_slots(fmt, head_size), device="cuda")
    # A mean is summed in another order: it may round to the neighbouring 16-bit number.
    assert test_store.differing_bits(got, want) <= (40 if name == "per component" else 0)


@pytest.mark.parametrize("quantile", [0.02, 0.25])
def test_store_quantile(quantile):
    fmt = make_format(128, 2)
    slots = [test_store.tag(5, s) * 16 + i for s in range(7) for i in range(16)]
    got, want = test_store.run(fmt, slots, quantile=quantile, device="cuda")
    assert test_store.differing_bits(got, want) <= want.numel() * 16 * 0.002


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize(("head_size", "bits", "group"), [(64, 1, 7), (80, 1, 1), (128, 2, 4)])
def test_prefill_later_chunks(head_size, bits, group, calibration):
    test_prefill.run_chunks(head_size, bits, group, calibration, device="cuda")


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize(("head_size", "bits"), [(64, 1), (64, 4), (128, 1), (128, 2)])
def test_prefill_shares_of_a_context(head_size, bits, splits, kernel, calibration):
    test_prefill.run_chunks(
        head_size, bits, 7, calibration, device="cuda", splits=splits, kernel=kernel
    )


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize(("bits", "group"), [(1, 1), (1, 7), (2, 7), (4, 16)])
def test_prefill_on_hopper(bits, group, splits, calibration):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    test_prefill.run_chunks(
        128, bits, group, calibration, device="cuda", splits=splits, kernel="hopper"
    )


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("kernel", ["gluon", "triton"])
@pytest.mark.parametrize("splits", [None, 1, 16])
@pytest.mark.parametrize("case", test_decode.PROFILES)
def test_prefill_profile(case, splits, kernel, calibration):
    *_, group = test_decode.PROFILES[case]
    test_prefill.run_chunks(
        *test_decode.profile_shape(case), group, calibration, device="cuda", splits=splits,
        kernel=kernel,
    )  # fmt: skip


@pytest.mark.parametrize("calibration", [None, (0.0, 3.0)])
@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("splits", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [None, *test_decode.PROFILES])
def test_prefill_in_a_basis(case, dtype, splits, kernel, calibration):
    head_size, bits = (128, 1) if case is None else test_decode.profile_shape(case)
    group = 7 if case is None else test_decode.PROFILES[case][-1]
    test_prefill.run_chunks(
        head_size, bits, group, calibration, device="cuda", splits=splits, kernel=kernel,
        dtype=dtype, in_basis=True,
    )  # fmt: skip


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_encoded_keys_and_values(head_size):
    test_basis.run_encode(head_size, device="cuda")


@pytest.mark.parametrize(
    ("head_size", "group", "tokens"),
    [(64, 7, 5), (80, 1, 3), (80, 1, 128), (128, 7, 64), (128, 7, 1100)],
)
def test_turned_queries_and_outputs(head_size, group, tokens):
    test_basis.run(head_size, group, tokens, device="cuda")


@pytest.mark.parametrize("case", test_join.CASES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_join_context(case, head_size):
    test_join.run(test_join.CASES[case], 4, head_size, device="cuda")


@pytest.mark.parametrize(
    ("profile", "in_basis"),
    [(False, False), (False, True), (True, True)],
)
def test_graph_replays_follow_the_tables(profile, in_basis):
    shape = test_decode.profile_shape("160 + 96 planes") if profile else (128, 1)
    test_decode.run_graph(make_format(*shape), group=7, heads=4, in_basis=in_basis)
