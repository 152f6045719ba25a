"""What the backends of all platforms share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType, MultipleOf

from vllm_calibquant.attention.reference import Calibration
from vllm_calibquant.config import DTYPE_BITS, CalibQuantConfig, load_config
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.format import GROUP

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

BLOCK_SIZE = 2 * GROUP


def load_config_of(vllm_config: VllmConfig) -> CalibQuantConfig:
    """Our settings in vLLM's configuration."""
    return load_config(vllm_config.cache_config.cache_dtype, vllm_config.additional_config)


class MixedBackend:
    """Base of the backends: first in the list of bases, before vLLM's backend of the platform."""

    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", *DTYPE_BITS]

    # vLLM asks a backend class for the KV cache spec of a layer and passes no configuration.  The
    # layers, which are made before, leave it here; a process loads one model at a time.
    config: ClassVar[CalibQuantConfig | None] = None
    model_dtype: ClassVar[torch.dtype | None] = None

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's registry of backends."""
        return "CALIBQUANT"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Sixteen: a tag would not survive the splitting of larger blocks."""
        return [BLOCK_SIZE]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Mixed pages for a layer that has our dtype."""
        config, dtype = MixedBackend.config, MixedBackend.model_dtype
        if config is None or dtype is None:
            raise RuntimeError("a KV cache spec was asked for before an attention layer was made")
        return MixedPageSpec.of(replace(spec, dtype=dtype), config)


class MixedLayer:
    """Base of the attention layers: settings of the codes, and refusals.

    Raises
    ------
    NotImplementedError
        For what the codes' part of the softmax does not have: ALiBi, soft-capped scores, sliding
        windows, attention sinks, KV sharing between layers, and attention other than causal
        self-attention.
    """

    calibration: Calibration | None
    config: CalibQuantConfig
    model_dtype: torch.dtype

    def init_mixed(self: Any) -> None:
        """Read our settings; called at the end of the constructor of the platform's layer."""
        vllm_config = get_current_vllm_config()
        sliding = self.sliding_window  # -1 on the CPU, (-1, -1) on CUDA, where there is none
        refused = {
            "ALiBi": self.alibi_slopes is not None,
            "soft-capped attention scores": bool(self.logits_soft_cap),
            "sliding-window attention": sliding not in (-1, (-1, -1)),
            "attention sinks": self.sinks is not None,
            "layers that share another layer's KV cache": bool(self.kv_sharing_target_layer_name),
            "attention other than causal self-attention": self.attn_type != AttentionType.DECODER,
        }
        for name, present in refused.items():
            if present:
                raise NotImplementedError(
                    f"--kv-cache-dtype {self.kv_cache_dtype} does not support {name}; serve this "
                    "model with --kv-cache-dtype auto"
                )
        self.kv_cache_dtype = "auto"  # text pages, as vLLM's own kernels read them
        config = load_config_of(vllm_config)
        self.config = config
        self.calibration = (
            Calibration(config.tau_min, config.tau_max) if config.calibrated else None
        )
        self.model_dtype = vllm_config.model_config.dtype
        MixedBackend.config, MixedBackend.model_dtype = config, self.model_dtype
