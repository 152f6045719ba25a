"""User configuration: ``--additional-config '{"calibquant": {...}}'`` or the same in YAML.

Every key has the published value as its default, so that ``--kv-cache-dtype calibquant1`` alone is
a complete configuration.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
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


class ConfigError(Exception):
    """A setting that cannot be served; the message is one sentence for the user.

    Not a ValueError: pydantic would wrap it, and the sentence would not be the last line of a
    failed start.
    """


class CalibQuantConfig(BaseModel):
    """Settings of the visual KV cache.

    The defaults are the settings of CalibQuant (arXiv 2502.14882, Sec. 3 and the authors' code).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[1, 2, 4] = 1
    """Bits per number of K and V of a visual token; the KV cache dtype decides."""

    range_estimator: Literal["minmax", "quantile"] = "minmax"
    """How the range of a channel of a page is found: its extremes, or the ``quantile`` and
    ``1 - quantile`` quantiles (the paper's first version)."""

    quantile: float = Field(default=0.02, ge=0.0, lt=0.5)
    """Share of a channel's values outside the range at either end, for ``quantile``."""

    key_range_factor: float | None = Field(default=None, gt=0.0, le=1.0)
    """Factor c on both ends of a K range; 0.5 at 1 bit and 1 otherwise unless set."""

    value_range_factor: float | None = Field(default=None, gt=0.0, le=1.0)
    """Factor c on both ends of a V range; 0.3 at 1 bit and 1 otherwise unless set."""

    calibration: bool | None = None
    """Whether visual scores are calibrated before the softmax; on at 1 and 2 bits unless set."""

    tau_min: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """How far calibration moves the smallest visual score down."""

    tau_max: float = Field(default=3.0, ge=0.0, allow_inf_nan=False)
    """How far calibration moves the largest visual score down."""

    modalities: tuple[Modality, ...] = ("image", "video")
    """Modalities whose embedded tokens are stored in codes."""

    layers_16bit: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Indices of decoder layers that keep all tokens at the model's precision."""

    profile: str | None = None
    """File of ``vllm-calibquant calibrate``: bit planes in a learned basis.  It decides widths,
    ranges and calibration; the KV cache dtype must be ``calibquant1``, whose bit planes it lays
    out anew."""

    @property
    def key_factor(self) -> float:
        """Factor c on both ends of a K range."""
        return self.key_range_factor or (0.5 if self.bits == 1 else 1.0)

    @property
    def value_factor(self) -> float:
        """Factor c on both ends of a V range."""
        return self.value_range_factor or (0.3 if self.bits == 1 else 1.0)

    @property
    def calibrated(self) -> bool:
        """Whether visual scores are calibrated."""
        return self.bits <= 2 if self.calibration is None else self.calibration


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
