"""What cannot be served with mixed pages, each in a sentence with the value and a remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_calibquant.config import CalibQuantConfig, ConfigError, load_config
from vllm_calibquant.format import BLOCK_SIZE, PageFormat
from vllm_calibquant.profile import ModelIdentity, exact_layers, load_profile, model_differences

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ON_CUDA = ("midpoint", "minmax", "quantile")
"""Range estimators that ``csrc_triton/store.py`` has: those of order statistics."""


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse a finished configuration that has our dtype and something that it cannot serve.

    Raises
    ------
    ConfigError
        With all reasons; a start that would answer wrongly, or drop tags from block ids, must not
        happen.
    """
    dtype = vllm_config.cache_config.cache_dtype
    config = load_config(dtype, vllm_config.additional_config)
    reasons = refusals(vllm_config, config)
    if reasons:
        raise ConfigError(f"--kv-cache-dtype {dtype} cannot be used: " + "; ".join(reasons))


def refusals(vllm_config: VllmConfig, config: CalibQuantConfig) -> list[str]:
    """Reasons why a configuration cannot be served, empty if there is none."""
    from vllm import envs
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    found: list[str] = []

    def refuse(condition: object, reason: str) -> None:
        if condition:
            found.append(reason)

    if model is None:
        return ["no model is configured"]
    refuse(model.use_mla, "the model has multi-head latent attention (MLA), whose cache holds no K")
    refuse(model.is_encoder_decoder, "encoder-decoder models are not supported")
    refuse(
        model.is_hybrid or model.is_attention_free or model.has_inner_state,
        "models with Mamba or other state layers are not supported",
    )
    refuse(
        model.is_mm_prefix_lm,
        "image tokens of this model attend in both directions, which is not supported",
    )
    refuse(
        model.get_sliding_window() is not None,
        f"the model has sliding-window layers (window {model.get_sliding_window()}), which are not "
        "supported",
    )
    refuse(
        model.attention_chunk_size or model.rswa_window,
        "the model has layers with chunked or windowed attention, which are not supported",
    )
    refuse(
        envs.VLLM_BATCH_INVARIANT,
        "VLLM_BATCH_INVARIANT is set, but sums over visual pages depend on the batch; unset it",
    )
    if not model.use_mla and not model.is_attention_free:
        head_size = model.get_head_size()
        try:
            PageFormat.uniform(head_size, config.bits, model.dtype)
        except ValueError as error:
            found.append(str(error))
    if config.profile:
        identity = ModelIdentity.of(model)
        found += model_differences(load_profile(config.profile), config.profile, identity)
    layers = model.get_total_num_hidden_layers()
    refuse(
        any(i >= layers for i in config.layers_16bit),
        f"layers_16bit is {list(config.layers_16bit)}; the model's layers are 0 to {layers - 1}",
    )
    refuse(
        {*range(layers)} <= {*exact_layers(config)},
        "layers_16bit names every layer of the model that could be in codes; leave "
        "--kv-cache-dtype at auto",
    )
    refuse(
        cache.user_specified_block_size and cache.block_size != BLOCK_SIZE,
        f"--block-size is {cache.block_size}; leave it unset or give {BLOCK_SIZE}",
    )
    refuse(
        cache.prefix_match_unit not in (None, BLOCK_SIZE),
        f"prefix_match_unit is {cache.prefix_match_unit}; leave it unset",
    )
    refuse(
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "context parallelism (--decode-context-parallel-size, --prefill-context-parallel-size) is "
        "not supported; use tensor parallelism",
    )
    refuse(
        parallel.use_ubatching,
        "dual-batch overlap (--enable-dbo, --ubatch-size) is not supported: layers have the tables "
        "of one batch",
    )
    refuse(
        vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
        "KV connectors and KV offloading (--kv-transfer-config, --kv-offloading-size) copy blocks "
        "by id and are not supported",
    )
    refuse(
        vllm_config.speculative_config is not None,
        "speculative decoding (--speculative-config) is not supported",
    )
    refuse(cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill is not supported")
    refuse(
        vllm_config.device_config.device_type != "cpu"
        and not (current_platform.is_cuda() and current_platform.has_device_capability(80)),
        "the GPU is none of NVIDIA's with compute capability 8.0 (Ampere) or more; leave "
        "--kv-cache-dtype at auto",
    )
    if vllm_config.device_config.device_type == "cuda":
        _refuse_without_kernels(vllm_config, config, refuse)
    scheduler = vllm_config.scheduler_config.scheduler_cls
    refuse(
        scheduler is not None and not str(scheduler).startswith("vllm_calibquant."),
        f"--scheduler-cls is {scheduler}, and mixed pages need a scheduler of their own",
    )
    return found


def _refuse_without_kernels(
    vllm_config: VllmConfig, config: CalibQuantConfig, refuse: Callable[[object, str], None]
) -> None:
    """Refuse what CUDA has no kernels for."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from csrc_triton import MAX_GROUP

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    refuse(
        not vllm_config.use_v2_model_runner,
        "on CUDA model runner V2 is needed; unset VLLM_USE_V2_MODEL_RUNNER and drop the options "
        "that vLLM's log names as unsupported by it",
    )
    refuse(
        config.estimator not in ON_CUDA,
        f"range_estimator is {config.estimator}, which has no CUDA kernel; give one of "
        f"{', '.join(ON_CUDA)}",
    )
    refuse(
        config.range_scope != "page",
        f"range_scope is {config.range_scope}, which has no CUDA kernel; leave it at page",
    )
    refuse(
        model.dtype.itemsize != 2,
        f"--dtype is {str(model.dtype).removeprefix('torch.')}, which has no CUDA kernel; give "
        "bfloat16 or half",
    )
    if not model.use_mla and not model.is_attention_free:
        size = model.get_head_size()
        group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        refuse(
            not FlashAttentionBackend.supports_head_size(size),
            f"the head size is {size}, which FlashAttention does not have here",
        )
        refuse(
            group > MAX_GROUP,
            f"{group} query heads share a KV head, and kernels take at most {MAX_GROUP}",
        )
