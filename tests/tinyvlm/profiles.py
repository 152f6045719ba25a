"""Profiles of the tiny model: ``python -m tests.tinyvlm.profiles``, or ``make profiles``.

Questions of the split ``calibration`` go through ``vllm-calibquant calibrate``, once for each
width.  Run it again when the weights have changed; it takes about five minutes a width on two
cores.
"""

import argparse
import json
import tempfile
from pathlib import Path

from .dataset import examples, write
from .unpack import HERE, model_path

WIDTHS = (1, 1.25, 1.5)
PROFILES = HERE / "profiles"
PER_TASK = 60


def profile_path(bits):
    """Where the profile of an average width is kept."""
    return PROFILES / f"bits{bits:g}.safetensors"


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("--count", type=int, default=PER_TASK, help="questions of each task")
    parser.add_argument("--out", type=Path, default=PROFILES)
    args = parser.parse_args()

    from vllm_calibquant.cli import main as command

    args.out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "tinyvlm-calibration")
        rows = list(examples("calibration", 1, args.count))
        write(data, rows)
        for bits in args.bits:
            out = args.out / profile_path(bits).name
            command(
                ["calibrate", str(model_path()), "--data", str(data / "qa.jsonl")]
                + ["--bits", str(bits), "--out", str(out), "--count", str(len(rows))]
                + ["--llm", json.dumps({"kv_cache_memory_bytes": 256 << 20})]
            )


if __name__ == "__main__":
    main()
