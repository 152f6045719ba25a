"""User configuration: ``--additional-config '{"calibquant": {...}}'`` or the same in YAML.

Every key has a default, so that ``--kv-cache-dtype calibquant1`` alone is a complete configuration:
what did best in our measurements (``preset: default``) or what was published (``preset:
calibquant-paper``).  A key that is given wins over the preset.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DTYPE_BITS = {"calibquant1": 1, "calibquant2": 2, "calibquant4": 4}
"""KV cache dtypes of this package and their bits per number of a visual token."""

SECTION = "calibquant"
"""Key of our settings in vLLM's ``additional_config``."""

PROFILE_DTYPE = "calibquant1"
BESIDE_PROFILE = ("bits", "modalities", "layers_16bit", "profile")
"""Keys that may stand beside ``profile``, which decides all others."""

Modality = Literal["image", "video"]
Estimator = Literal["midpoint", "minmax", "quantile", "two-means", "unbiased-slope"]
RangeScope = Literal["page", "request"]
Transform = Literal["none", "hadamard"]


@dataclass(frozen=True)
class Preset:
    """What keys that are left out are, by bits."""

    range_estimator: Estimator
    calibrated_bits: tuple[int, ...]
    """Widths with calibration."""


PRESETS = {
    "default": Preset("midpoint", ()),
    "calibquant-paper": Preset("minmax", (1, 2)),
}

FACTORS: dict[tuple[str, int], tuple[float, float]] = {
    ("midpoint", 1): (0.55, 0.55),
    ("midpoint", 2): (1.0, 0.9),
    ("minmax", 1): (0.5, 0.3),
}
"""Range factors of K and V by estimator and bits; 1 where nothing is said.

Those of ``minmax`` are the authors' (arXiv 2502.14882 and its code), those of ``midpoint`` did best
on the calibration split of ``tests/tinyvlm``, whose README has the measurements.
"""


class ConfigError(Exception):
    """A setting that cannot be served; the message is one sentence for the user.

    Not a ValueError: pydantic would wrap it, and the sentence would not be the last line of a
    failed start.
    """


class CalibQuantConfig(BaseModel):
    """Settings of the visual KV cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[1, 2, 4] = 1
    """Bits per number of K and V of a visual token; the KV cache dtype decides."""

    preset: Literal["default", "calibquant-paper"] = "default"
    """Which defaults ``range_estimator``, its factors and ``calibration`` have: ours, or those of
    CalibQuant (arXiv 2502.14882, Sec. 3 and the authors' code)."""

    range_estimator: Estimator | None = None
    """How the range of a channel is found (:mod:`vllm_calibquant.quantize`); from the preset unless
    set.  CUDA serves the first three."""

    range_scope: RangeScope = "page"
    """Which tokens share the range of a channel: those of a page, or all visual tokens of a request
    that one step computes, as published (arXiv 2502.14882, Sec. 3).  Pages of such a step then hold
    equal ranges; later chunks of the request have their own.  CUDA serves ``page`` alone."""

    transform: Transform = "none"
    """What K and V are multiplied by before they are coded: nothing, or the Walsh-Hadamard matrix
    (AKVQ-VL, arXiv 2501.15021), which spreads each channel over all; queries and outputs are
    multiplied likewise, at the cost of a small product a layer.  Unlike a profile it needs no
    data."""

    quantile: float = Field(default=0.02, ge=0.0, lt=0.5)
    """Share of a channel's values outside the range at either end, for ``quantile``."""

    key_range_factor: float | None = Field(default=None, gt=0.0, le=1.0)
    """Factor c of a K range; that of the estimator and the bits in :data:`FACTORS` unless set."""

    value_range_factor: float | None = Field(default=None, gt=0.0, le=1.0)
    """Factor c of a V range, likewise."""

    calibration: bool | None = None
    """Whether visual scores are calibrated before the softmax; from the preset unless set."""

    tau_min: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """How far calibration moves the smallest visual score down."""

    tau_max: float = Field(default=3.0, ge=0.0, allow_inf_nan=False)
    """How far calibration moves the largest visual score down."""

    modalities: tuple[Modality, ...] = Field(default=("image", "video"), min_length=1)
    """Modalities whose embedded tokens are stored in codes."""

    layers_16bit: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Indices of decoder layers that keep all tokens at the model's precision."""

    profile: str | None = Field(default=None, min_length=1)
    """File of ``vllm-calibquant calibrate``: bit planes in a learned basis.  It decides widths,
    ranges and calibration; the KV cache dtype must be ``calibquant1``, whose bit planes it lays
    out anew."""

    @property
    def estimator(self) -> Estimator:
        """How ranges are found."""
        return self.range_estimator or PRESETS[self.preset].range_estimator

    @property
    def key_factor(self) -> float:
        """Factor c of a K range."""
        return self.key_range_factor or FACTORS.get((self.estimator, self.bits), (1.0, 1.0))[0]

    @property
    def value_factor(self) -> float:
        """Factor c of a V range."""
        return self.value_range_factor or FACTORS.get((self.estimator, self.bits), (1.0, 1.0))[1]

    @property
    def calibrated(self) -> bool:
        """Whether visual scores are calibrated."""
        if self.calibration is None:
            return self.bits in PRESETS[self.preset].calibrated_bits
        return self.calibration


def bits_of(cache_dtype: str) -> int | None:
    """Bits of one of our KV cache dtypes, or None for any other dtype."""
    return DTYPE_BITS.get(cache_dtype)


def load_config(cache_dtype: str, additional_config: Any) -> CalibQuantConfig:
    """Read our section of vLLM's ``additional_config``.

    Parameters
    ----------
    cache_dtype
        One of :data:`DTYPE_BITS`.
    additional_config
        The mapping given to vLLM; other sections belong to other plugins and are not looked at.

    Raises
    ------
    ConfigError
        For an unknown key (with the nearest valid one), an impossible value, a number of bits
        that contradicts the dtype, or a key that contradicts a profile.
    """
    section = (additional_config or {}).get(SECTION, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"additional_config.{SECTION} must be a mapping, got {section!r}")
    names = list(CalibQuantConfig.model_fields)
    for key in section:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown key {key!r} in additional_config.{SECTION}; nearest is {near!r}"
            )
    bits = DTYPE_BITS[cache_dtype]
    if section.get("bits", bits) != bits:
        raise ConfigError(
            f"additional_config.{SECTION}.bits is {section['bits']!r} but --kv-cache-dtype is "
            f"{cache_dtype}; leave bits out, or choose the dtype that has it"
        )
    if section.get("profile") is not None:
        if cache_dtype != PROFILE_DTYPE:
            raise ConfigError(
                f"--kv-cache-dtype is {cache_dtype}, but a profile needs {PROFILE_DTYPE}, whatever "
                f"the bits that it has on average; give {PROFILE_DTYPE}, or leave profile out"
            )
        for key in section:
            if key not in BESIDE_PROFILE:
                raise ConfigError(
                    f"additional_config.{SECTION} has both profile and {key}, which the profile "
                    f"decides; leave {key} out"
                )
    try:
        return CalibQuantConfig(**{**section, "bits": bits})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"additional_config.{SECTION}.{where} is {first['input']!r}: {first['msg']}"
        ) from None
