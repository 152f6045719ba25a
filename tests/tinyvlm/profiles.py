"""Profiles of the tiny model: ``python -m tests.tinyvlm.profiles``, or ``make profiles``.

Questions of the split ``calibration`` go through ``vllm-calibquant calibrate``, once for each
width.  Run it again when the weights have changed; two widths take an hour on two cores, and
``--jobs`` are as many widths, or tasks to draw, at once.  The profile of 1 bit kept here is of an
earlier search, with 60 questions of each task and 135 to judge by.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .dataset import examples
from .generator import TASKS
from .unpack import HERE, model_path

WIDTHS = (1, 1.25, 1.5)
PROFILES = HERE / "profiles"
PER_TASK = 80
ASKED = (*TASKS, "pair")
"""Tasks of the prompts; a turn after another asks the same."""


def profile_path(bits):
    """Where the profile of an average width is kept."""
    return PROFILES / f"bits{bits:g}.safetensors"


def draw(task, count, folder):
    """Write pictures of a task; return its lines of ``prompts.jsonl``."""
    lines = []
    for i, example in enumerate(examples("calibration", 1, count, (task,))):
        names = [f"{task}_{i:05d}_{k}.png" for k in range(len(example.images))]
        for name, image in zip(names, example.images, strict=True):
            image.save(folder / name, compress_level=1)
        lines.append(json.dumps({"image": names, "question": example.question}))
    return lines


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("--count", type=int, default=PER_TASK, help="questions of each task")
    parser.add_argument("--held-out", type=int, default=180, help="of all, to judge by")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=PROFILES)
    parser.add_argument("--seconds", type=float, help="for each search")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="of profiles; a new one is written if it is at least as good",
    )
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    # The second is what vLLM wants to see free on a GPU before it starts.
    llm = {"kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.04}
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "tinyvlm-calibration")
        data.mkdir()
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            drawn = [pool.submit(draw, task, args.count, data) for task in ASKED]
            lines = [line for future in drawn for line in future.result()]
        (data / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")

        def calibrate(bits):
            out = args.out / profile_path(bits).name
            command = [sys.executable, "-m", "vllm_calibquant.cli", "calibrate", str(model_path())]
            command += ["--data", str(data), "--bits", str(bits), "--out", str(out)]
            command += ["--count", str(len(lines)), "--held-out", str(args.held_out)]
            if args.seconds is not None:
                command += ["--seconds", str(args.seconds)]
            if args.against is not None:
                command += ["--against", str(args.against / out.name)]
            subprocess.run([*command, "--llm", json.dumps(llm)], check=True)

        with ThreadPoolExecutor(args.jobs) as threads:
            list(threads.map(calibrate, args.bits))


if __name__ == "__main__":
    main()
