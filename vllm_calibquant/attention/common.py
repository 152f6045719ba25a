"""What the backends of all platforms share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType, MultipleOf

from vllm_calibquant.attention.reference import Calibration
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.config import DTYPE_BITS, CalibQuantConfig, load_config
from vllm_calibquant.core.spec import MixedPageSpec
from vllm_calibquant.format import BLOCK_SIZE
from vllm_calibquant.profile import Profile, load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


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
    profile: Profile | None
    model_dtype: torch.dtype
    codec: Codec
    """Set by :func:`bind_layers`, before anything is stored."""

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
        self.profile = load_profile(config.profile) if config.profile else None
        taus = (config.tau_min, config.tau_max) if config.calibrated else None
        if self.profile is not None:
            taus = self.profile.calibration
        self.calibration = Calibration(*taus) if taus else None
        self.model_dtype = vllm_config.model_config.dtype
        MixedBackend.config, MixedBackend.model_dtype = config, self.model_dtype

    def use_codec(self, codec: Codec) -> None:
        """Store and read pages with a codec from now on; pages written before become garbage."""
        self.codec = codec


def bind_layers(vllm_config: VllmConfig, layer_names: list[str], device: torch.device) -> None:
    """Give each layer of ours its codec, which depends on its index where there is a profile."""
    layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
    for name, layer in layers.items():
        impl: Any = layer.impl
        if impl.profile is None:
            codec = Codec.of(
                impl.config, impl.num_kv_heads, impl.head_size, impl.model_dtype, device
            )
        else:
            codec = Codec.of_profile(
                impl.profile,
                extract_layer_index(name),
                kv_heads_of_rank(impl.profile.model.num_kv_heads, impl.num_kv_heads),
                impl.model_dtype,
                device,
            )
        impl.use_codec(codec)


def kv_heads_of_rank(total: int, local: int) -> slice:
    """Which of a model's KV heads this tensor-parallel rank holds; small models repeat them."""
    ranks = get_tensor_model_parallel_world_size()
    start = get_tensor_model_parallel_rank() * total // ranks
    return slice(start, start + local)
