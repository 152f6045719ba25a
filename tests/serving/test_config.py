"""Settings: what is refused and how, files that vLLM's own parser takes, and its help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from vllm_calibquant.config import (
    DTYPE_BITS,
    CalibQuantConfig,
    ConfigError,
    Estimator,
    bits_of,
    load_config,
)
from vllm_calibquant.quantize import RANGE_ESTIMATORS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def load(dtype: str = "calibquant1", **section: object) -> CalibQuantConfig:
    return load_config(dtype, {"calibquant": section, "other plugin": {"bits": 3}})


@pytest.mark.parametrize(
    ("dtype", "bits", "factors"),
    [
        ("calibquant1", 1, (0.55, 0.55)),
        ("calibquant2", 2, (1.0, 0.9)),
        ("calibquant4", 4, (1.0, 1.0)),
    ],
)
def test_defaults(dtype, bits, factors) -> None:
    for nothing in (
        None,
        {},
        {"calibquant": {}},
        {"other": 1},
        {"calibquant": {"preset": "default"}},
    ):
        config = load_config(dtype, nothing)
        assert bits_of(dtype) == config.bits == bits
        assert config.estimator == "midpoint" and not config.calibrated
        assert (config.range_scope, config.transform) == ("page", "none")
        assert (config.key_factor, config.value_factor) == factors
        assert (config.modalities, config.layers_16bit) == (("image", "video"), ())


@pytest.mark.parametrize(
    ("dtype", "key", "value", "calibrated"),
    [
        ("calibquant1", 0.5, 0.3, True),
        ("calibquant2", 1.0, 1.0, True),
        ("calibquant4", 1.0, 1.0, False),
    ],
)
def test_preset_of_the_paper(dtype, key, value, calibrated) -> None:
    config = load(dtype, preset="calibquant-paper")
    assert (config.estimator, config.range_scope) == ("minmax", "page")
    assert (config.key_factor, config.value_factor) == (key, value)
    assert (config.calibrated, config.tau_min, config.tau_max) == (calibrated, 0.0, 3.0)


def test_given_values_win() -> None:
    config = load(
        "calibquant4", calibration=True, key_range_factor=0.8, layers_16bit=[0, 3], bits=4
    )
    assert (config.calibrated, config.key_factor, config.value_factor) == (True, 0.8, 1.0)
    assert config.layers_16bit == (0, 3)
    config = load(preset="calibquant-paper", calibration=False, value_range_factor=0.6)
    assert (config.calibrated, config.key_factor, config.value_factor) == (False, 0.5, 0.6)


def test_factors_belong_to_the_estimator() -> None:
    """What is tuned for one is not taken over by another."""
    for name in get_args(Estimator):
        config = load(range_estimator=name)
        factors = {"midpoint": (0.55, 0.55), "minmax": (0.5, 0.3)}.get(name, (1.0, 1.0))
        assert (config.estimator, config.key_factor, config.value_factor) == (name, *factors)
    assert {*get_args(Estimator)} == {*RANGE_ESTIMATORS}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("tau", "tau_m"),  # two keys are equally near
        ("key_factor", "key_range_factor"),
        ("calibrate", "calibration"),
        ("layers16bit", "layers_16bit"),
        ("modality", "modalities"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(**{key: 1})
    assert f"unknown key {key!r}" in str(error.value)
    assert f"nearest is '{nearest}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("range_estimator", "median"),
        ("range_scope", "image"),
        ("transform", "fourier"),
        ("preset", "paper"),
        ("quantile", 0.5),
        ("quantile", -0.1),
        ("key_range_factor", 0.0),
        ("value_range_factor", 1.5),
        ("value_range_factor", "wide"),
        ("calibration", "maybe"),
        ("tau_min", -1.0),
        ("tau_max", float("nan")),
        ("tau_max", float("inf")),
        ("modalities", ["audio"]),
        ("layers_16bit", [-1]),
        ("layers_16bit", ["first"]),
    ],
)
def test_impossible_value_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        load(**{key: value})
    sentence = str(error.value)
    assert f"additional_config.calibquant.{key}" in sentence
    assert "\n" not in sentence


def test_bits_belong_to_the_dtype() -> None:
    with pytest.raises(ConfigError, match="bits is 2 but --kv-cache-dtype is calibquant1"):
        load("calibquant1", bits=2)
    with pytest.raises(ConfigError, match="bits is 3"):
        load("calibquant4", bits=3)


@pytest.mark.parametrize("section", [[], "bits=1", 1])
def test_section_is_a_mapping(section: object) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config("calibquant1", {"calibquant": section})


# Through vLLM.


def serve_arguments(*arguments: str):
    """What ``vllm serve`` makes of its command line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve = parser.add_subparsers(dest="subparser").add_parser("serve")
    make_arg_parser(serve)
    parsed = parser.parse_args(["serve", *arguments])
    # EngineArgs looks a model of the hub up at once, and there is none here.
    name, parsed.model = (
        getattr(parsed, "model_tag", None) or parsed.model,
        str(Path(__file__).parent),
    )
    args = EngineArgs.from_cli_args(parsed)
    args.model = name
    return args


def test_there_is_a_file_for_each_family() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {"llava", "qwen2.5-vl", "qwen3-vl", "internvl", "video"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_file_parses(path: Path) -> None:
    args = serve_arguments("--config", str(path))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert args.model == written["model"]
    assert args.kv_cache_dtype == written["kv-cache-dtype"]
    assert args.max_model_len == written["max-model-len"]
    assert args.limit_mm_per_prompt == written["limit-mm-per-prompt"]
    assert args.additional_config == written["additional-config"]
    # Every key is shown, at the value that leaving it out would give.
    section = args.additional_config["calibquant"]
    assert {*section} == {*CalibQuantConfig.model_fields} - {"bits"}
    shown, default = (load_config(args.kv_cache_dtype, c) for c in (args.additional_config, None))
    effective = lambda c: {  # noqa: E731
        **c.model_dump(),
        "range_estimator": c.estimator,
        "key_range_factor": c.key_factor,
        "value_range_factor": c.value_factor,
        "calibration": c.calibrated,
    }
    assert effective(shown) == effective(default)


def test_command_line() -> None:
    section = '{"calibquant": {"tau_max": 1.5}}'
    args = serve_arguments("m", "--kv-cache-dtype", "calibquant2", "--additional-config", section)
    assert args.kv_cache_dtype == "calibquant2"
    assert load_config(args.kv_cache_dtype, args.additional_config).tau_max == 1.5
    with pytest.raises(SystemExit):
        serve_arguments("m", "--kv-cache-dtype", "calibquant3")


def test_cache_config_takes_the_dtypes() -> None:
    from vllm.config.cache import CacheConfig, CacheDType
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert {*DTYPE_BITS} <= {*get_args(CacheDType)}
    assert len(get_args(CacheDType)) == len({*get_args(CacheDType)})
    for dtype in DTYPE_BITS:
        assert CacheConfig(cache_dtype=dtype).cache_dtype == dtype
    with pytest.raises(ValueError, match="calibquant1"):  # the list of what there is
        CacheConfig(cache_dtype="calibquant3")


@pytest.mark.parametrize("option", ["kv-cache-dtype", "all"])
def test_help_lists_the_dtypes(option: str) -> None:
    command = [Path(sys.executable).parent / "vllm", "serve", f"--help={option}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert all(dtype in done.stdout for dtype in DTYPE_BITS)
