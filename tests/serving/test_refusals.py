"""What cannot be served stops the start with one sentence.

Configurations are vLLM's own, built from a ``config.json`` alone: nothing is served here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_calibquant import compat, plugin
from vllm_calibquant.config import ConfigError
from vllm_calibquant.refusals import check_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
MISTRAL = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 64,
}
DEEPSEEK = {
    **LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 2,
    "first_k_dense_replace": 2,
}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "is_encoder_decoder": True,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 128,
    "max_target_positions": 256,
}
MAMBA = {
    "architectures": ["MambaForCausalLM"],
    "model_type": "mamba",
    "hidden_size": 64,
    "state_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 128,
}
BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_size": 64,
    "n_layer": 1,
    "n_head": 2,
    "vocab_size": 128,
}


def write(directory: Path, config: dict) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


def start(directory: Path, config: dict, dtype: str = "calibquant1", **settings):
    """The finished configuration of an engine."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        write(directory / "model", config),
        kv_cache_dtype=dtype,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        **settings,
    )
    return args.create_engine_config()


def sentence_of(error: BaseException) -> str:
    """What a user reads, and that it is one line which names the flag and ends without noise."""
    text = str(error)
    assert "\n" not in text
    assert "--kv-cache-dtype" in text
    return text


def test_what_can_be_served_is(tmp_path) -> None:
    config = start(tmp_path, LLAMA)
    assert config.cache_config.block_size == 16
    assert config.scheduler_config.scheduler_cls == plugin.SCHEDULER
    config.scheduler_config.async_scheduling = True  # which the CPU platform turns off
    plugin.configure(lambda config: None, config)
    assert config.scheduler_config.scheduler_cls == plugin.ASYNC_SCHEDULER


def test_other_dtypes_are_left_alone(tmp_path) -> None:
    """Nothing that we refuse, and nothing that we set, concerns anyone else."""
    config = start(tmp_path, MISTRAL, "auto", block_size=32)
    assert config.scheduler_config.scheduler_cls is None
    assert config.cache_config.block_size == 32


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (DEEPSEEK, {}, "multi-head latent attention"),
        (MISTRAL, {}, r"sliding-window layers \(window 64\)"),
        (WHISPER, {}, "encoder-decoder"),
        (MAMBA, {}, "Mamba"),
        ({**LLAMA, "head_dim": 36}, {}, "head size 36 is not a multiple of 8"),
        ({**LLAMA, "attention_chunk_size": 64}, {}, "chunked or windowed attention"),
        (LLAMA, {"block_size": 32}, "--block-size is 32; leave it unset or give 16"),
        (LLAMA, {"kv_offloading_size": 1.0}, "KV connectors and KV offloading"),
        (
            LLAMA,
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "KV connectors and KV offloading",
        ),
        (
            LLAMA,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
        (LLAMA, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
        (LLAMA, {"additional_config": {"calibquant": {"layers_16bit": [2]}}}, "layers are 0 to 1"),
        (LLAMA, {"additional_config": {"calibquant": {"layers_16bit": [0, 1]}}}, "every layer"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split("(")[0].strip("\\ "),
)
def test_start_is_refused(tmp_path, model: dict, settings: dict, reason: str) -> None:
    if "kv_transfer_config" in settings:
        from vllm.config import KVTransferConfig

        settings = {"kv_transfer_config": KVTransferConfig(**settings["kv_transfer_config"])}
    with pytest.raises(ConfigError, match=reason) as error:
        start(tmp_path, model, **settings)
    assert "cannot be used" in sentence_of(error.value)


def test_batch_invariance_is_refused(tmp_path, monkeypatch) -> None:
    config = start(tmp_path, LLAMA)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ConfigError, match="VLLM_BATCH_INVARIANT is set"):
        plugin.configure(lambda config: None, config)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("prefill_context_parallel_size", 2, "context parallelism"),
        ("enable_dbo", True, "dual-batch overlap"),
        ("ubatch_size", 2, "dual-batch overlap"),
    ],
)
def test_other_parallelism_is_refused(tmp_path, name: str, value: int, reason: str) -> None:
    """A finished configuration is changed, since vLLM wants as many devices as ranks."""
    config = start(tmp_path, LLAMA)
    setattr(config.parallel_config, name, value)
    with pytest.raises(ConfigError, match=reason):
        plugin.configure(lambda config: None, config)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"bits": 1}, "compute capability 8.0"),  # a CPU has none
        ({"range_scope": "request"}, "range_scope is request, which has no CUDA kernel"),
        ({"range_estimator": "two-means"}, "range_estimator is two-means, which has no CUDA"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_has_no_kernel_is_refused_on_cuda(tmp_path, section: dict, reason: str) -> None:
    """A finished configuration of the CPU, which serves them, is given another device."""
    config = start(tmp_path, LLAMA, additional_config={"calibquant": section})
    config.device_config.device_type = "cuda"
    with pytest.raises(ConfigError, match=reason) as error:
        check_config(config)
    sentence_of(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_attention_heads": 32}, "32 query heads share a KV head"),
        ({"head_dim": 512}, "the head size is 512"),
        ({}, "--dtype is float32"),
    ],
    ids=["group", "head size", "dtype"],
)
def test_models_without_kernels_are_refused_on_cuda(tmp_path, change: dict, reason: str) -> None:
    config = start(tmp_path, {**LLAMA, **change})
    config.device_config.device_type = "cuda"
    with pytest.raises(ConfigError, match=reason) as error:
        check_config(config)
    sentence_of(error.value)


def test_all_reasons_are_told_at_once(tmp_path) -> None:
    with pytest.raises(ConfigError) as error:
        start(tmp_path, MISTRAL, block_size=32)
    assert "sliding-window" in (text := sentence_of(error.value))
    assert "--block-size" in text


@pytest.mark.parametrize("dtype", ["calibquant", "calibquant3", "calibquant16"])
def test_other_bits_are_no_dtype(tmp_path, dtype: str) -> None:
    with pytest.raises(ValueError, match="calibquant1"):
        start(tmp_path, LLAMA, dtype)


def test_bad_settings_stop_the_start(tmp_path) -> None:
    section = {"additional_config": {"calibquant": {"tau": 1}}}
    with pytest.raises(ConfigError, match="unknown key 'tau'"):
        start(tmp_path, LLAMA, **section)


# Layers, whose attention is known when they are built.


@dataclasses.dataclass
class Layer:
    """The fields of vLLM's AttentionSelectorConfig that are asked for."""

    kv_cache_dtype: str = "calibquant1"
    has_sliding_window: bool = False
    has_sink: bool = False
    use_mla: bool = False
    use_sparse: bool = False
    use_mm_prefix: bool = False


@pytest.mark.parametrize(
    "field", ["has_sliding_window", "has_sink", "use_mla", "use_sparse", "use_mm_prefix"]
)
def test_layer_is_refused(tmp_path, field: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import AttentionSelectorConfig

    names = {f.name for f in dataclasses.fields(Layer)}
    assert names <= {*AttentionSelectorConfig._fields}
    with set_current_vllm_config(start(tmp_path, LLAMA)):
        selected = plugin.select_backend(lambda *_: "stock", None, Layer())
        assert selected in (plugin.CPU_BACKEND, plugin.CUDA_BACKEND)
        with pytest.raises(ConfigError, match="the model has layers with") as error:
            plugin.select_backend(lambda *_: "stock", None, Layer(**{field: True}))
    sentence_of(error.value)


def test_alibi_is_refused_while_loading(tmp_path) -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with pytest.raises(NotImplementedError, match="does not support ALiBi") as error:
            LLM(
                write(tmp_path / "model", BLOOM),
                kv_cache_dtype="calibquant1",
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="float32",
                enforce_eager=True,
                max_model_len=64,
                kv_cache_memory_bytes=1 << 20,
            )
    cleanup_dist_env_and_memory()
    sentence_of(error.value)


# The plugin itself.


def test_unknown_vllm_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compat, "version", lambda name: "0.99.1+cpu")
    with pytest.raises(ConfigError, match=r"does not know vLLM 0\.99\.1; install vllm==") as error:
        start(tmp_path, LLAMA)
    sentence_of(error.value)
    assert start(tmp_path, LLAMA, "auto").scheduler_config.scheduler_cls is None


def test_unknown_vllm_starts_without_us(monkeypatch) -> None:
    """Names that have moved are no reason why vLLM should not serve other dtypes."""
    from vllm.config import cache

    monkeypatch.setattr(compat, "version", lambda name: "0.99.1")
    monkeypatch.delattr(cache, "CacheDType")
    with pytest.raises(AttributeError):
        compat.add_cache_dtypes()
    plugin.register()


def test_scheduler_wants_mixed_pages(tmp_path) -> None:
    """As where the worker has no plugin, or another backend took the layers."""
    import torch
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = start(tmp_path, LLAMA)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = 8
    plain = KVCacheConfig(8, [], [KVCacheGroupSpec(["layer"], spec)])
    for name in (plugin.SCHEDULER, plugin.ASYNC_SCHEDULER):
        with pytest.raises(RuntimeError, match="no layer has mixed pages") as error:
            resolve_obj_by_qualname(name)(
                vllm_config=config,
                kv_cache_config=plain,
                structured_output_manager=StructuredOutputManager(config),
                block_size=16,
                hash_block_size=16,
            )
        sentence_of(error.value)


def test_process_without_plugin_does_not_know_the_dtype() -> None:
    script = (
        "from vllm.config.cache import CacheConfig\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "CacheConfig(cache_dtype='calibquant1')\n"
    )
    command = [sys.executable, "-c", script]
    for plugins, code in (("calibquant", 0), ("", 1)):
        environment = {**os.environ, "VLLM_PLUGINS": plugins}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        assert ("Input should be" in done.stderr) == bool(code)


def test_last_line_of_vllm_serve_is_the_sentence(tmp_path) -> None:
    command = [
        Path(sys.executable).parent / "vllm",
        *("serve", write(tmp_path / "model", MISTRAL), "--skip-tokenizer-init"),
        *("--kv-cache-dtype", "calibquant1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1] == (
        "vllm_calibquant.config.ConfigError: --kv-cache-dtype calibquant1 cannot be used: "
        "the model has sliding-window layers (window 64), which are not supported"
    )
