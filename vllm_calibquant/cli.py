"""Command line: ``vllm-calibquant calibrate MODEL --data DIR --bits 1.25 --out FILE``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from vllm_calibquant.config import ConfigError

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


def make_parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    parser = argparse.ArgumentParser(
        "vllm-calibquant", description="Tools for calibquant KV caches"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser(
        "calibrate",
        help="search a profile: bit planes in a learned basis, for one model",
        description="Search the basis, bits and ranges in which a model's visual tokens lose least "
        "at a number of bits, by the divergence of next-token distributions from 16 bits. An "
        "interrupted search goes on where it was when the same command is given again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = calibrate.add_argument
    add("model", help="name or directory, as for vllm serve")
    add(
        "--data",
        required=True,
        help="'synthetic'; or a directory with prompts.jsonl, or such a file, whose lines are "
        'objects like {"image": "chart.png", "question": "What is the total?"} with paths relative '
        "to the file (a list of paths for several images); the nearer to what will be asked, the "
        "better",
    )
    add("--bits", type=float, default=1.25, help="of a visual token's numbers, on average")
    add("--out", type=Path, required=True, help="the profile, a safetensors file")
    add("--count", type=int, default=360, help="prompts, evenly from the data")
    add("--held-out", type=int, default=90, help="of them, to judge by")
    add("--seed", type=int, default=1, help="of synthetic data")
    add("--max-tokens", type=int, default=32, help="of the 16-bit model's answers")
    add("--trials", type=int, default=40, help="profiles to try at most")
    add("--llm", type=json.loads, default={}, help="further arguments of vLLM's LLM, as JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    args = vars(make_parser().parse_args(argv))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    args.pop("command")
    from vllm_calibquant.calibrate.search import Task, calibrate

    try:
        print(calibrate(Task(**args)))
    except ConfigError as error:
        sys.exit(f"vllm-calibquant calibrate: {error}")


if __name__ == "__main__":
    main()
