"""Command line.

``vllm-calibquant calibrate MODEL --data DIR --bits 1.25`` searches a profile;
``vllm-calibquant inspect MODEL IMAGE QUESTION`` shows what codes do to an image.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_calibquant.config import ConfigError

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
CPU_POOL_BYTES = 4 << 30
"""Of the KV cache on a CPU; vLLM would ask for nearly all memory, and refuse to start."""


def positive(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def settings(text: str) -> dict[str, Any]:
    """A JSON object."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return found


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
    add(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help="the profile (default: MODEL-BITS.safetensors, here)",
    )
    add("--count", type=positive, default=360, help="prompts, evenly from the data")
    add("--held-out", type=positive, default=90, help="of them, a quarter at most, to judge by")
    add("--seed", type=int, default=1, help="of synthetic data")
    add("--max-tokens", type=positive, default=32, help="of the 16-bit model's answers")
    add(
        "--trials",
        type=int,
        default=64,
        help="profiles to try at most, besides those with layers at 16 bits",
    )
    add("--seconds", type=float, help="try no further profile when the command has run so long")
    add(
        "--against",
        type=Path,
        metavar="PROFILE",
        help="judge this profile by the same prompts, and write nothing unless the new one is at "
        "least as near to 16 bits",
    )
    add("--llm", type=settings, default={}, help="further arguments of vLLM's LLM, as JSON")
    inspect = commands.add_parser(
        "inspect",
        help="show what codes do to one image and one question",
        description="Ask one question about one image at 16 bits and with visual tokens in codes, "
        "and write a page with the answers, the image's tokens and the error of keys, values and "
        "attention in every layer and head.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = inspect.add_argument
    add("model", help="name or directory, as for vllm serve")
    add("image", type=Path, help="a picture")
    add("question")
    add(
        "--out",
        type=Path,
        default=Path("inspect.html"),
        help="the page, an HTML file that needs no other",
    )
    add("--widths", type=int, nargs="+", choices=(1, 2, 4), default=[4, 2, 1], help="bits")
    add("--profile", type=Path, help="a profile of this model to look at too")
    add("--max-tokens", type=positive, default=64, help="of an answer")
    add("--llm", type=settings, default={}, help="further arguments of vLLM's LLM, as JSON")
    return parser


def pool_settings(llm: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``LLM`` that set the size of the KV cache, unless some do already."""
    from vllm.platforms import current_platform

    said = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & llm.keys()
    if said or not current_platform.is_cpu():
        return {}
    return {"kv_cache_memory_bytes": CPU_POOL_BYTES}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script."""
    args = vars(make_parser().parse_args(argv))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    command = args.pop("command")
    args["llm"] |= pool_settings(args["llm"])
    try:
        if command == "calibrate":
            from vllm_calibquant.calibrate.command import Task, calibrate

            name = f"{Path(args['model']).name}-{args['bits']:g}.safetensors"
            args.setdefault("out", Path(name))
            print(calibrate(Task(**args)))
        else:
            from vllm_calibquant.inspector import inspect_image

            print(inspect_image(**args))
            print(f"\n{args['out']}")
    except ConfigError as error:
        sys.exit(f"vllm-calibquant {command}: {error}")
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if command == "calibrate" else ""
        print(f"\nvllm-calibquant {command}: interrupted{again}", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
