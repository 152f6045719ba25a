"""Entry point of the group ``vllm.general_plugins``: makes vLLM know our KV cache dtypes.

vLLM calls :func:`register` in the API server, in the engine core and in every worker. A plugin
that raises is only logged, so what must hold is checked again where it matters: the scheduler
refuses to start without mixed pages, and a worker without this plugin does not know the dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_calibquant import admission, compat
from vllm_calibquant.config import ConfigError, bits_of, load_config
from vllm_calibquant.format import BLOCK_SIZE
from vllm_calibquant.profile import exact_layers
from vllm_calibquant.refusals import check_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_BACKEND = "vllm_calibquant.attention.cpu.MixedCPUBackend"
CPU_PLAIN_BACKEND = "vllm_calibquant.attention.cpu.PlainCPUBackend"
CUDA_BACKEND = "vllm_calibquant.attention.cuda.MixedCUDABackend"
SCHEDULER = "vllm_calibquant.core.scheduler.MixedPageScheduler"
ASYNC_SCHEDULER = "vllm_calibquant.core.scheduler.MixedPageAsyncScheduler"


def register() -> None:
    """Register dtypes, backend, KV cache spec and configuration hook; may be called repeatedly."""
    from vllm.platforms import current_platform

    if compat.vllm_version() not in compat.VLLM_VERSIONS:
        # `configure` says why our dtypes cannot be used.  Where even these names have moved, vLLM
        # does not know the dtypes, and serves all else as ever.
        with contextlib.suppress(Exception):
            compat.add_cache_dtypes()
            compat.wrap_platform("check_and_update_config", configure)
        return
    compat.add_cache_dtypes()
    compat.wrap_platform("check_and_update_config", configure)

    from vllm_calibquant.core.manager import MixedPageManager
    from vllm_calibquant.core.spec import MixedPageSpec
    from vllm_calibquant.metrics import CalibQuantStatLogger

    if current_platform.is_cpu():
        compat.add_backend(CPU_BACKEND)
    else:
        compat.add_backend(CUDA_BACKEND)
        compat.watch_block_tables()
        compat.add_text_graphs()
    compat.add_spec(MixedPageSpec, MixedPageManager)
    compat.clear_pages_beside(MixedPageSpec)
    compat.wrap_platform("get_attn_backend_cls", select_backend)
    compat.check_prompts(admission.check_prompt)
    compat.add_stat_logger(CalibQuantStatLogger)


def configure(original: Callable[..., None], vllm_config: VllmConfig) -> None:
    """After the platform's changes to a configuration: refuse, then set what our dtype needs."""
    original(vllm_config)
    dtype = vllm_config.cache_config.cache_dtype
    if bits_of(dtype) is None:
        return
    compat.check_version()
    # The platform has put its own default into an unset block size.
    check_config(vllm_config)
    config = load_config(dtype, vllm_config.additional_config)
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    cache.block_size = BLOCK_SIZE
    skipped = {*cache.kv_cache_dtype_skip_layers, *map(str, exact_layers(config))}
    cache.kv_cache_dtype_skip_layers = sorted(skipped)
    scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER


def select_backend(
    original: Callable[..., str],
    selected_backend: Any,
    attn_selector_config: Any,
    num_heads: int | None = None,
) -> str:
    """Our backend for layers of our dtype.

    Raises
    ------
    ConfigError
        For a layer that mixed pages cannot serve.
    """
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    layer = attn_selector_config
    run_dtype = get_current_vllm_config().cache_config.cache_dtype
    if bits_of(run_dtype) is None:
        return original(selected_backend, layer, num_heads)
    if bits_of(layer.kv_cache_dtype or "auto") is None:
        # A layer left at the model's precision.  vLLM's CPU kernels read 16-token pages, but its
        # CPU backend does not say so.
        if current_platform.is_cpu():
            return CPU_PLAIN_BACKEND
        return original(selected_backend, layer, num_heads)
    for name, present in (
        ("sliding windows", layer.has_sliding_window),
        ("attention sinks", layer.has_sink),
        ("multi-head latent attention", layer.use_mla),
        ("sparse attention", layer.use_sparse),
        ("bidirectional image attention", layer.use_mm_prefix),
    ):
        if present:
            raise ConfigError(
                f"--kv-cache-dtype {run_dtype} cannot be used: the model has layers with {name}, "
                "which are not supported"
            )
    return CPU_BACKEND if current_platform.is_cpu() else CUDA_BACKEND
