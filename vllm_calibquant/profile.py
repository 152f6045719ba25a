"""Profiles: bit planes in a learned basis, for one model, in one safetensors file.

A profile says, for each layer and KV head, in which basis keys and values are coded::

    y = T (x - mean)        coded, ranges per page as ever
    x ~ mean + T^-1 y

and how many bits each of the D components of ``y`` has.  Rows of T are ordered by importance, so
one list of bits serves all heads of a layer.  Scores and outputs need no dequantised key or value:
``q . k = (T^-T q) . y + q . mean``, and ``T^-1`` and the mean go on the output
(:mod:`vllm_calibquant.attention.basis`).

The file holds, for layer ``i`` and part ``key`` or ``value``:

=========================  ==========================  ==========================================
tensor                     shape                       content
=========================  ==========================  ==========================================
``layers.i.key.basis``     ``[Hkv, D, D]`` bfloat16    T; rows have about unit length
``layers.i.key.mean``      ``[Hkv, D]`` float32        the mean that is taken off
``layers.i.key.bits``      ``[D]`` uint8               bits of each component, falling
``layers.i.key.factors``   ``[D]`` float32             factor c on both ends of a range
=========================  ==========================  ==========================================

and in its metadata the format's version, the model that it belongs to, and how it came to be.  A
layer without tensors stays at the model's precision.  :mod:`vllm_calibquant.calibrate` makes
profiles.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_calibquant.config import CalibQuantConfig, ConfigError
from vllm_calibquant.format import MAX_SLOTS, PageFormat

if TYPE_CHECKING:
    from vllm.config import ModelConfig

FORMAT_VERSION = 1
PARTS = ("key", "value")


@dataclass(frozen=True)
class ModelIdentity:
    """What must agree between a profile and the model that it is used for."""

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    fingerprint: str
    """Hash of further numbers of the model's configuration; weights are not part of it."""

    @classmethod
    def of(cls, model: ModelConfig) -> ModelIdentity:
        """Identity of a model that vLLM has configured."""
        text = model.hf_text_config
        vision = getattr(model.hf_config, "vision_config", None)
        known = {
            "text": _numbers(text, ("vocab_size", "intermediate_size", "num_attention_heads")),
            "rope": _numbers(text, ("rope_theta", "rope_parameters", "rope_scaling")),
            "vision": _numbers(vision, ("hidden_size", "num_hidden_layers", "depth", "patch_size")),
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
        return cls(
            model_type=model.hf_config.model_type,
            num_layers=model.get_total_num_hidden_layers(),
            num_kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            hidden_size=model.get_hidden_size(),
            fingerprint=digest.hexdigest()[:16],
        )


def _numbers(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {n: getattr(config, n) for n in names if getattr(config, n, None) is not None}


@dataclass(frozen=True, eq=False)
class PartProfile:
    """Basis and widths of K or of V of one layer, all its KV heads."""

    basis: torch.Tensor
    """``[Hkv, D, D]``: T, whose rows are the components."""
    mean: torch.Tensor
    """``[Hkv, D]``."""
    bits: tuple[int, ...]
    """Bits of each component."""
    factors: torch.Tensor
    """``[D]``: factor c on both ends of a component's range."""


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """Both parts of a layer."""

    key: PartProfile
    value: PartProfile

    @property
    def planes(self) -> int:
        """Bit planes of a token and KV head, K and V."""
        return sum(self.key.bits) + sum(self.value.bits)


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything in a profile."""

    model: ModelIdentity
    layers: Mapping[int, LayerProfile]
    """By layer index; the others stay at the model's precision."""
    calibration: tuple[float, float] | None = None
    """tau_min and tau_max of the calibration of scores, or None for none."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and what was measured, for people."""

    @property
    def average_bits(self) -> float:
        """Bits per number of a visual token, mean over the coded layers, K and V."""
        planes = sum(layer.planes for layer in self.layers.values())
        return planes / (2 * self.model.head_size * len(self.layers))

    @property
    def layers_16bit(self) -> tuple[int, ...]:
        """Layers that stay at the model's precision."""
        return tuple(i for i in range(self.model.num_layers) if i not in self.layers)

    def slots(self, dtype: torch.dtype) -> int:
        """Sub-slots of a visual page: what every coded layer can do."""
        common = MAX_SLOTS
        while True:
            slots = min(self._format(i, dtype, common).slots for i in self.layers)
            if slots == common:
                return slots
            common = slots

    def page_format(self, layer: int, dtype: torch.dtype) -> PageFormat:
        """Byte map of a layer's visual pages."""
        return self._format(layer, dtype, self.slots(dtype))

    def _format(self, layer: int, dtype: torch.dtype, max_slots: int) -> PageFormat:
        parts = self.layers[layer]
        return PageFormat(
            self.model.head_size,
            parts.key.bits,
            parts.value.bits,
            dtype,
            max_slots=max_slots,
        )

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors = {}
        for i, layer in self.layers.items():
            for name in PARTS:
                part: PartProfile = getattr(layer, name)
                found = {
                    "basis": part.basis.to(torch.bfloat16),
                    "mean": part.mean.float(),
                    "bits": torch.tensor(part.bits, dtype=torch.uint8),
                    "factors": part.factors.float(),
                }
                for what, tensor in found.items():
                    # A copy: the format refuses tensors that share memory.
                    copy = tensor.clone(memory_format=torch.contiguous_format)
                    tensors[f"layers.{i}.{name}.{what}"] = copy
        scratch = path.with_name(path.name + ".part")
        save_file(tensors, scratch, self._metadata())
        scratch.chmod(0o644)  # the library keeps others from reading
        scratch.replace(path)

    def _metadata(self) -> dict[str, str]:
        from vllm_calibquant import __version__

        return {
            "format": "vllm-calibquant profile",
            "format_version": str(FORMAT_VERSION),
            "model": json.dumps(asdict(self.model)),
            "calibration": json.dumps(self.calibration),
            "average_bits": f"{self.average_bits:g}",
            "created_by": f"vllm-calibquant {__version__}",
            "notes": json.dumps(self.notes),
        }


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises
    ------
    ConfigError
        If there is no such file, if it is no profile, of another format version, or inconsistent.
    """
    try:
        stat = Path(path).stat()
    except OSError:
        raise ConfigError(
            f"profile {str(path)!r} does not exist; vllm-calibquant calibrate makes one"
        ) from None
    return _load(str(path), (stat.st_mtime_ns, stat.st_ino, stat.st_size))


@lru_cache(maxsize=4)  # every attention layer asks
def _load(path: str, version_of_file: tuple[int, ...]) -> Profile:
    def refuse(reason: str) -> ConfigError:
        return ConfigError(
            f"profile {path!r} {reason}; make it anew with vllm-calibquant calibrate"
        )

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise refuse(f"cannot be read ({error})") from None
    if metadata.get("format") != "vllm-calibquant profile":
        raise refuse("is not a profile of vllm-calibquant")
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise refuse(f"has format version {version}, and this release reads {FORMAT_VERSION}")
    try:
        model = ModelIdentity(**json.loads(metadata["model"]))
        taus = json.loads(metadata["calibration"])
        profile = Profile(
            model,
            _layers(tensors, model),
            _calibration(taus) if taus else None,
            json.loads(metadata.get("notes", "{}")),
        )
        if not isinstance(profile.notes, dict):
            raise ValueError("its notes are no object")
        profile.slots(torch.bfloat16)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise refuse(f"is damaged ({error})") from None
    return profile


def _calibration(taus: Any) -> tuple[float, float]:
    tau_min, tau_max = map(float, taus)
    if not (0 <= tau_min < math.inf and 0 <= tau_max < math.inf):
        raise ValueError(f"its tau_min and tau_max are {tau_min} and {tau_max}")
    return tau_min, tau_max


def _layers(tensors: Mapping[str, torch.Tensor], model: ModelIdentity) -> dict[int, LayerProfile]:
    d, heads = model.head_size, model.num_kv_heads
    shapes = {"basis": (heads, d, d), "mean": (heads, d), "bits": (d,), "factors": (d,)}
    layers = {}
    for i in sorted({int(name.split(".")[1]) for name in tensors}):
        if i >= model.num_layers:
            raise ValueError(f"it has a layer {i}, and its model {model.num_layers} layers")
        parts = {}
        for part in PARTS:
            found = {name: tensors[f"layers.{i}.{part}.{name}"] for name in shapes}
            for name, shape in shapes.items():
                if tuple(found[name].shape) != shape:
                    raise ValueError(
                        f"layers.{i}.{part}.{name} is {list(found[name].shape)}, not {list(shape)}"
                    )
                if not found[name].isfinite().all():
                    raise ValueError(f"layers.{i}.{part}.{name} has numbers that are not finite")
            if found["bits"].is_floating_point():
                raise ValueError(f"layers.{i}.{part}.bits are no whole numbers")
            if not ((found["factors"] > 0) & (found["factors"] <= 1)).all():
                raise ValueError(f"layers.{i}.{part}.factors are not all above 0 and at most 1")
            basis = found["basis"].float()
            if torch.linalg.inv_ex(basis).info.any():
                raise ValueError(f"layers.{i}.{part}.basis has no inverse")
            parts[part] = PartProfile(
                basis,
                found["mean"],
                tuple(found["bits"].tolist()),
                found["factors"],
            )
        layers[i] = LayerProfile(**parts)
    if not layers:
        raise ValueError("it has no layer")
    return layers


def exact_layers(config: CalibQuantConfig) -> tuple[int, ...]:
    """Layers left at the model's precision, by the settings or by their profile."""
    exact = {*config.layers_16bit}
    if config.profile:
        exact |= {*load_profile(config.profile).layers_16bit}
    return tuple(sorted(exact))


def model_differences(profile: Profile, path: str, model: ModelIdentity) -> list[str]:
    """Why a profile does not belong to a model, in a sentence, or nothing."""
    for name, own in asdict(profile.model).items():
        found = getattr(model, name)
        if own == found:
            continue
        what = f"with {name} {own!r}, and this model has {found!r}"
        if name == "fingerprint":
            what = (
                "of the same shape, but of another vocabulary, MLP size, number of query heads, "
                "rotary embedding or vision tower"
            )
        return [
            f"profile {path!r} is for a model {what}; make one for this model with "
            "vllm-calibquant calibrate"
        ]
    return []
