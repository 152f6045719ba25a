"""Profiles: the file, what is refused, the algebra of a basis, and a real vLLM that serves one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.serving.test_refusals import LLAMA, start
from tests.tinyvlm.profiles import WIDTHS as AVERAGES
from tests.tinyvlm.profiles import profile_path
from tests.tinyvlm.unpack import model_path
from vllm_calibquant.attention.basis import Basis, hadamard
from vllm_calibquant.attention.reference import Calibration, VisualPages, mixed_attention
from vllm_calibquant.attention.store import Codec, store_visual
from vllm_calibquant.config import ConfigError, load_config
from vllm_calibquant.core.report import profile_line
from vllm_calibquant.profile import (
    FORMAT_VERSION,
    LayerProfile,
    ModelIdentity,
    PartProfile,
    Profile,
    load_profile,
)
from vllm_calibquant.tags import tag

D = 32
MODEL = ModelIdentity("llama", 2, 1, D, 64, "0" * 16)
WIDTHS = ((4,) * 4 + (2,) * 8 + (1,) * 16 + (0,) * 4, (2,) * 8 + (1,) * 16 + (0,) * 8)
"""48 planes of K and 32 of V: P_K is padded, and differs from P_V."""


def make_part(model: ModelIdentity, bits: tuple[int, ...], seed: int) -> PartProfile:
    """Random basis, not orthogonal, and a mean that matters."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.num_kv_heads, model.head_size, model.head_size)
    basis = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
    basis += 0.05 * torch.randn(shape, generator=generator)
    return PartProfile(
        basis.bfloat16().float(),
        0.5 * torch.randn(shape[:2], generator=generator),
        bits,
        0.6 + 0.4 * torch.rand(model.head_size, generator=generator),
    )


def make_profile(model: ModelIdentity = MODEL, widths=None, **settings) -> Profile:
    """``widths``: bits of K and of V for each layer."""
    widths = widths or [WIDTHS] * model.num_layers
    layers = {
        i: LayerProfile(make_part(model, k, 2 * i), make_part(model, v, 2 * i + 1))
        for i, (k, v) in enumerate(widths)
    }
    return Profile(model, layers, **settings)


# The file.


def test_round_trip(tmp_path: Path) -> None:
    profile = make_profile(calibration=(0.5, 2.0), notes={"kl": 0.25})
    path = tmp_path / "a.safetensors"
    profile.save(path)
    found = load_profile(path)
    assert found.model == MODEL
    assert (found.calibration, dict(found.notes)) == ((0.5, 2.0), {"kl": 0.25})
    assert found.average_bits == (48 + 32) / (2 * D)
    for i, layer in profile.layers.items():
        for name in ("key", "value"):
            one, other = getattr(layer, name), getattr(found.layers[i], name)
            assert one.bits == other.bits
            for tensor in ("basis", "mean", "factors"):
                assert torch.equal(getattr(one, tensor), getattr(other, tensor))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == str(FORMAT_VERSION)
    assert metadata["average_bits"] == "1.25"
    assert metadata["created_by"].startswith("vllm-calibquant ")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_profile().save(path)
    assert load_profile(path).calibration is None
    make_profile(calibration=(0.0, 1.0)).save(path)
    assert load_profile(path).calibration == (0.0, 1.0)


def edit(path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file({**load_file(path), **tensors}, path, {**old, **(metadata or {})})


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"format_version": "2"}, {}, "has format version 2, and this release reads 1"),
        ({"format": "pt"}, {}, "is not a profile"),
        ({"model": "{}"}, {}, "is damaged"),
        ({}, {"layers.7.key.bits": torch.zeros(D)}, "has a layer 7"),
        ({}, {"layers.0.key.basis": torch.zeros(1, D, 8)}, r"is \[1, 32, 8\], not \[1, 32, 32\]"),
        ({}, {"layers.0.key.mean": torch.full((1, D), float("nan"))}, "not finite"),
        ({}, {"layers.0.key.bits": torch.full((D,), 9, dtype=torch.uint8)}, "must lie in 0..8"),
        ({}, {"layers.0.key.bits": torch.ones(D)}, "bits are no whole numbers"),
        ({}, {"layers.0.value.factors": torch.full((D,), -0.5)}, "factors are not all above 0"),
        ({}, {"layers.0.value.basis": torch.zeros(1, D, D)}, "basis has no inverse"),
        ({}, {"extra": torch.ones(1)}, "is damaged"),
        ({"calibration": "[1]"}, {}, "is damaged"),
        ({"calibration": "[-1, 2]"}, {}, "its tau_min and tau_max are -1.0 and 2.0"),
        ({"calibration": "[0, NaN]"}, {}, "its tau_min and tau_max are 0.0 and nan"),
        ({"notes": "[1]"}, {}, "its notes are no object"),
    ],
)
def test_bad_files_are_refused(tmp_path, metadata, tensors, message) -> None:
    path = tmp_path / "a.safetensors"
    make_profile().save(path)
    edit(path, metadata, **tensors)
    with pytest.raises(ConfigError, match=message) as error:
        load_profile(path)
    assert "a.safetensors" in str(error.value)
    assert str(error.value).endswith("make it anew with vllm-calibquant calibrate")
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.safetensors' does not exist"):
        load_profile(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors here, only a sentence", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "text")


def test_layers_share_the_fewest_sub_slots() -> None:
    model = replace(MODEL, head_size=64)

    def bits(planes: int) -> tuple[int, ...]:
        return tuple(planes // 64 + (j < planes % 64) for j in range(64))

    even = make_profile(model, [(bits(128), bits(64)), (bits(96), bits(96))])
    assert even.slots(torch.bfloat16) == 8  # 9 would do for the first
    assert [even.page_format(i, torch.bfloat16).slots for i in (0, 1)] == [8, 8]
    odd = make_profile(model, [(bits(128), bits(64)), (bits(64), bits(96))])
    assert odd.page_format(1, torch.bfloat16).slots == odd.slots(torch.bfloat16) == 8
    assert make_profile(model, [(bits(128), bits(64))]).slots(torch.float16) == 9


def test_layers_that_it_lacks_stay_exact(tmp_path: Path) -> None:
    profile = make_profile(widths=[WIDTHS])
    assert profile.layers_16bit == (1,)
    profile = replace(profile, model=identity_of(tmp_path))
    profile.save(tmp_path / "p")
    config = start(tmp_path, LLAMA, additional_config=section(tmp_path / "p"))
    assert config.cache_config.kv_cache_dtype_skip_layers == ["1"]


# Refusals at start.


def section(path: Path, **others) -> dict:
    return {"calibquant": {"profile": str(path), **others}}


def identity_of(directory: Path) -> ModelIdentity:
    return ModelIdentity.of(start(directory, LLAMA, "auto").model_config)


def test_its_own_model_is_served(tmp_path: Path) -> None:
    model = identity_of(tmp_path)
    assert replace(model, fingerprint=MODEL.fingerprint) == MODEL
    make_profile(model).save(tmp_path / "p")
    assert start(tmp_path, LLAMA, additional_config=section(tmp_path / "p"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "with model_type 'llava', and this model has 'llama'"),
        ({"num_layers": 4}, "with num_layers 4, and this model has 2"),
        ({"hidden_size": 32}, "with hidden_size 32, and this model has 64"),
        ({"fingerprint": "abc"}, "of the same shape, but of another vocabulary"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    model = replace(identity_of(tmp_path), **change)
    make_profile(model, [WIDTHS] * 2).save(tmp_path / "p")
    with pytest.raises(ConfigError, match=message) as error:
        start(tmp_path, LLAMA, additional_config=section(tmp_path / "p"))
    assert "make one for this model with vllm-calibquant calibrate" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_dtypes_and_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is calibquant2, but a profile needs calibquant1"):
        load_config("calibquant2", section(tmp_path / "p"))
    with pytest.raises(ConfigError, match="both profile and key_range_factor"):
        load_config("calibquant1", section(tmp_path / "p", key_range_factor=0.5))
    with pytest.raises(ConfigError, match="both profile and range_scope"):
        load_config("calibquant1", section(tmp_path / "p", range_scope="request"))
    config = load_config("calibquant1", section(tmp_path / "p", layers_16bit=[1]))
    assert config.layers_16bit == (1,)


# The algebra.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_moves_to_the_other_side(dtype: torch.dtype) -> None:
    model = replace(MODEL, num_kv_heads=4)
    layer = make_profile(model).layers[0]
    basis = Basis.of(layer, slice(1, 3), dtype, "cpu")  # two heads of this rank
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(6, 4, D, generator=generator).to(dtype)
    x = torch.randn(9, 2, D, generator=generator).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    for part, profile in ((basis.key, layer.key), (basis.value, layer.value)):
        y = part.encode(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        exact = torch.einsum(
            "hed,thd->the", profile.basis[1:3].double(), x.double() - profile.mean[1:3].double()
        )
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    turned, shift = basis.query(q)
    scores = torch.einsum("thgd,nhd->thgn", *(
        turned.unflatten(1, (2, 2)).double(), basis.key.encode(x).double()
    )) + shift.unflatten(1, (2, 2))[..., None]  # fmt: skip
    expected = torch.einsum("thgd,nhd->thgn", q.unflatten(1, (2, 2)).double(), x.double())
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)
    weights = torch.rand(4, 9, generator=generator).softmax(-1)
    coded, heads = basis.value.encode(x).float(), [0, 0, 1, 1]
    y = torch.einsum("hn,nhd->hd", weights, coded[:, heads])
    back = basis.output(y[None].to(dtype))
    expected = torch.einsum("hn,nhd->hd", weights, x.float()[:, heads])
    torch.testing.assert_close(back[0].float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [8, 24, 64, 80, 128])
def test_hadamard_spreads_a_channel_over_its_block(size: int) -> None:
    found, block = hadamard(size), size & -size
    torch.testing.assert_close(found @ found, torch.eye(size))
    assert torch.equal(found, found.T)
    for i, row in enumerate(found):
        start = i // block * block
        assert torch.equal(row.nonzero().flatten(), torch.arange(start, start + block))
        torch.testing.assert_close(
            row[start : start + block].abs(), torch.full((block,), block**-0.5)
        )


@pytest.mark.parametrize("calibration", [None, Calibration(0.5, 2.0)])
def test_attention_to_pages_in_a_basis(calibration) -> None:
    """Against pages of the dequantised numbers, with the equations in float64."""
    profile = make_profile(replace(MODEL, num_kv_heads=2))
    codec = Codec.of_profile(profile, 0, slice(0, 2), torch.float32)
    fmt = codec.page_format
    generator = torch.Generator().manual_seed(3)
    key, value = (torch.randn(40 + 3, 2, D, generator=generator) for _ in range(2))
    query = torch.randn(3, 4, D, generator=generator)
    pages = torch.full((4, 2, fmt.head_bytes), 0xFF, dtype=torch.uint8)
    mapping = torch.cat([tag(2, 1) * 16 + torch.arange(16), tag(2, 2) * 16 + torch.arange(16)])
    store_visual(key[:32], value[:32], pages, mapping, codec)
    used = torch.zeros(1, fmt.tokens, dtype=torch.bool)
    used[0, 16:48] = True
    visual = VisualPages(pages[2:3], used)
    out = mixed_attention(
        query, key[32:], value[32:], visual,
        page_format=fmt, scale=D**-0.5, calibration=calibration, basis=codec.basis,
    )  # fmt: skip

    k, v, ranges = fmt.unpack(pages[2])
    exact = []
    for codes, (scale, offset), part in (
        (k, ranges[:, :2].unbind(1), profile.layers[0].key),
        (v, ranges[:, 2:].unbind(1), profile.layers[0].value),
    ):
        y = offset[:, None].double() + scale[:, None].double() * codes[:, 16:48].double()
        x = torch.linalg.solve(part.basis.double(), y.mT).mT + part.mean[:, None].double()
        exact.append(x.transpose(0, 1))
    expected = torch.zeros(3, 4, D, dtype=torch.float64)
    for t in range(3):
        for h in range(4):
            q = query[t, h].double()
            text = key[32 : 32 + 8 + t + 1, h // 2].double() @ q * D**-0.5
            seen = exact[0][:, h // 2] @ q * D**-0.5
            if calibration is not None:
                low, high = seen.min(), seen.max()
                width = (high - calibration.tau_max) - (low - calibration.tau_min)
                seen = low - calibration.tau_min + (seen - low) * width.clamp(min=0) / (high - low)
            weights = torch.cat([text, seen]).softmax(0)
            rows = torch.cat([value[32 : 32 + 8 + t + 1, h // 2].double(), exact[1][:, h // 2]])
            expected[t, h] = weights @ rows
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


# The profiles in this repository.


@pytest.mark.parametrize("bits", AVERAGES)
def test_profiles_of_the_small_model(bits: float) -> None:
    """They belong to today's weights: if this fails, the weights have changed, so make profiles."""
    path = profile_path(bits)
    profile = load_profile(path)
    assert profile.notes["model"] == model_path().name, "run make profiles"
    assert profile.average_bits == bits
    assert profile.layers_16bit == ()
    assert path.stat().st_size < 1 << 18


def test_the_start_says_where_a_profile_comes_from() -> None:
    profile = load_profile(profile_path(1.25))
    made = profile.notes["model"]
    line = f"profile p: 1.25 bits a number, made for {made} from {profile.notes['prompts']} prompts"
    assert profile_line(profile, "p", f"some/{made}") == line
    other = profile_line(profile, "p", "/models/tuned")
    assert other.startswith(f"{line}; tuned has the same shape, but if its weights differ")
    assert profile_line(replace(profile, notes={}), "p", "m") == "profile p: 1.25 bits a number"
