r"""What codes cost in right answers: ``python -m benchmarks.accuracy``.

A real vLLM answers questions on images under each KV cache dtype and setting, and every setting is
compared with the first one, 16 bits, on the same questions.  By default the model is the document
reader of ``tests/tinyvlm``, whose questions no training has seen; ``--model`` and ``--data`` take
any other, and ``--base-url`` asks servers that run already::

    python -m benchmarks.accuracy --model OpenGVLab/InternVL3-8B-hf \
        --data HuggingFaceM4/ChartQA::test lmms-lab/DocVQA:DocVQA lmms-lab/textvqa
    python -m benchmarks.accuracy --base-url auto=http://a:8000/v1 calibquant1=http://b:8000/v1

Three modes differ in who reads codes:

``decode``
    The question comes with its image and both are computed in one step, which is exact: only
    generated tokens read codes, as in the paper.
``prefix-hit``
    The image is in the prefix cache already, from another question: the question's tokens read
    codes too.
``chunks``
    The prompt is computed in chunks that cut the image, whose own later tokens then read codes.

Exact match has Wilson 95 % intervals.  *Agreement* is the share of greedy tokens that are equal to
those at 16 bits, until two answers part.  *KL* is the mean divergence, in nats, of the next-token
distribution from the one at 16 bits while the true answer is forced token by token; it is a lower
bound, from the 20 most likely tokens of either side with all others taken as one
(:func:`benchmarks.accuracy_metrics.divergence`).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import accuracy_report
from benchmarks.accuracy_data import SHORT_ANSWER, Parts, load_rows
from benchmarks.accuracy_engines import Setting
from benchmarks.accuracy_jobs import Found, Message, Outcome, Unit, divide, run_units
from benchmarks.accuracy_metrics import agreement, divergence, mean_drop, wilson
from benchmarks.records import (
    environment,
    options,
    print_table,
    record_path,
    save_record,
)

NAME = "accuracy"
MODES = ("decode", "prefix-hit", "chunks")
WIDTHS = ("auto", "calibquant4", "calibquant2", "calibquant1")
"""16 bits, which all are compared with, and the defaults of every width."""

PROFILES = tuple(
    f"calibquant1 profile=tests/tinyvlm/profiles/bits{bits}.safetensors"
    for bits in ("1", "1.25", "1.5")
)
"""Learned bit planes of the tiny reader (``make profiles``)."""

STOCK = (
    "fp8",
    "int4_per_token_head",
    "turboquant_k8v4",
    "turboquant_4bit_nc",
    "turboquant_3bit_nc",
)
"""What stock vLLM has, on GPUs."""

NOT_ON_CUDA = ("unbiased-slope", "two-means", "range_scope=request")
"""Range estimators, and a scope of ranges, without a kernel."""

SETTINGS = (
    *WIDTHS,
    *PROFILES,
    "calibquant2 preset=calibquant-paper",
    "calibquant1 preset=calibquant-paper",
    "calibquant1 preset=calibquant-paper range_scope=request",  # as published
    "calibquant1 preset=calibquant-paper calibration=false",
    "calibquant1 range_estimator=quantile",  # the paper's first version
    "calibquant1 range_estimator=unbiased-slope",
    "calibquant1 range_estimator=two-means",
    "calibquant1 range_scope=request",
    "calibquant1 transform=hadamard",
    "calibquant2 transform=hadamard",
    "calibquant1 calibration=true",
    "calibquant1 layers_16bit=[0]",
)
QUICK = {
    "label": "quick",  # no table of the README is made of so few questions
    "count": 6,
    "kl_count": 2,
    "settings": ["auto", "calibquant2", *PROFILES, "calibquant1"],
    "modes": list(MODES[:2]),
    "jobs": 2,
}
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes have these cores too
}
TINY_LLM = {"dtype": "bfloat16", "max_model_len": 2048, "kv_cache_memory_bytes": 512 << 20}
TINY_LLM_ON_CUDA = {
    "enforce_eager": True,  # graphs take longer to capture than they save
    "kv_cache_memory_bytes": 2 << 30,
    "gpu_memory_utilization": 0.04,  # vLLM refuses to start where less than this is free
    "max_num_batched_tokens": 32768,
    "mm_processor_cache_gb": 1,
}
"""So that a dozen of engines share a GPU and its host."""
SAVE_EVERY_S = 20
OTHER_LLM = {"dtype": "bfloat16", "max_model_len": 8192}


# Results.


class Results:
    """What processes have reported, and the record of it so far."""

    def __init__(self, units: list[Unit], settings: list[Setting], bar: tqdm) -> None:
        self.units, self.settings, self.bar = units, settings, bar
        self.found = [Found() for _ in settings]

    def take(self, message: Message) -> None:
        """Note a message."""
        unit = self.units[message.unit]
        found = self.found[unit.setting]
        if message.kind == "size":
            found.bytes_per_visual_token = message.content
        elif message.kind == "asked":
            self.bar.update(message.content)
        elif message.kind == "part":
            mode, part, outcomes = message.content
            found.modes.setdefault(mode, {})[part] = outcomes
        elif message.kind == "done":
            found.seconds = max(found.seconds, message.content)
        else:
            found.error = message.content
            self.bar.write(f"{self.settings[unit.setting].name}: {message.content}")

    def settings_record(self) -> list[dict[str, Any]]:
        """Numbers of all settings over the questions that each and the first have answered."""
        first = self.found[0].modes
        record = []
        for setting, found in zip(self.settings, self.found, strict=True):
            entry: dict[str, Any] = {"setting": setting.name, "bits": setting.bits}
            if found.error is not None:
                entry["error"] = found.error
            if found.bytes_per_visual_token is not None:
                entry["bytes_per_visual_token"] = found.bytes_per_visual_token
            entry["seconds"] = found.seconds
            entry["modes"] = {
                mode: compare(first[mode], parts)
                for mode, parts in found.modes.items()
                if first.get(mode, {}).keys() & parts.keys()
            }
            record.append(entry)
        return record


def by_task(outcomes: list[Outcome]) -> dict[str, list[bool]]:
    """Whether answers were right, by task."""
    tasks: dict[str, list[bool]] = {}
    for outcome in outcomes:
        tasks.setdefault(outcome.task, []).append(outcome.right)
    return tasks


def compare(reference: dict[int, list[Outcome]], found: dict[int, list[Outcome]]) -> dict[str, Any]:
    """Numbers of one mode of a setting, beside those of the reference."""
    common = sorted(reference.keys() & found.keys())
    first, own = ([o for part in common for o in side[part]] for side in (reference, found))
    right = by_task(own)
    tasks = {}
    for task, outcomes in right.items():
        low, high = wilson(sum(outcomes), len(outcomes))
        tasks[task] = {
            "n": len(outcomes),
            "exact_match": round(100 * sum(outcomes) / len(outcomes), 2),
            "interval": [round(low, 2), round(high, 2)],
            "outcomes": "".join(str(int(o)) for o in outcomes),
        }
    drop, half = mean_drop(by_task(first), right)
    steps = [
        divergence(x, y)
        for a, b in zip(first, own, strict=True)
        if a.steps is not None and b.steps is not None
        for x, y in zip(a.steps, b.steps, strict=True)
    ]
    same = agreement([o.tokens for o in first], [o.tokens for o in own])
    hits = [o.hit for o in own if o.hit is not None]
    return {
        "tasks": tasks,
        "mean": round(100 * mean(mean(outcomes) for outcomes in right.values()), 2),
        "drop": round(drop, 2),
        "drop_half_interval": round(half, 2),
        "agreement": same if same is None else round(same, 2),
        "kl": float(f"{mean(steps):.4g}") if steps else None,
        "kl_tokens": len(steps),
        "mean_hit_tokens": round(mean(hits), 1) if hits else None,
    }


def print_results(record: dict[str, Any]) -> None:
    """Print a Markdown table for each mode."""
    for mode in record["modes"]:
        answered = [s for s in record["settings"] if mode in s["modes"]]
        if not answered:
            continue
        tasks = list(answered[0]["modes"][mode]["tasks"])
        body = []
        for setting in answered:
            result = setting["modes"][mode]
            cells = []
            for task in tasks:
                found = result["tasks"][task]
                low, high = found["interval"]
                cells.append(f"{found['exact_match']:.1f} ({low:.0f}–{high:.0f})")
            size, kl = setting.get("bytes_per_visual_token"), result["kl"]
            same = result["agreement"]  # servers without log-probabilities do not say tokens
            body.append(
                [
                    setting["setting"],
                    "" if size is None else f"{size:.0f}",
                    str(max(task["n"] for task in result["tasks"].values())),
                    *cells,
                    f"{result['mean']:.1f}",
                    f"{result['drop']:.1f} ± {result['drop_half_interval']:.1f}",
                    "" if same is None else f"{same:.1f}",
                    "" if kl is None else f"{kl:.4f}",
                ]
            )
        print(f"\nMode {mode}: exact match in %, 95 % intervals\n")
        header = ["setting", "bytes a visual token", "n a task", *tasks, "mean"]
        print_table([*header, "points below 16 bits", "agreement, %", "KL, nats"], body)
    for setting in record["settings"]:
        if "error" in setting:
            print(f"\n{setting['setting']}: {setting['error']}")


def summary_lines(record: dict[str, Any]) -> str:
    """Points below 16 bits of every width: with a profile if one was measured, else by default.

    A line for prefix hits, then one for mode ``decode``.
    """
    lines = []
    for mode, name in (("prefix-hit", "accuracy_drop_prefix_hit"), ("decode", "accuracy_drop")):
        drops: dict[float, float] = {}
        for setting in record["settings"][1:]:
            learned = "profile=" in setting["setting"]
            if mode in setting["modes"] and (learned or setting["setting"] in WIDTHS):
                drop = setting["modes"][mode]["drop"]
                if learned or setting["bits"] not in drops:
                    drops[setting["bits"]] = drop
        if drops:
            lines.append(" ".join([name, *(f"bits{b:g}={drops[b]:.1f}" for b in sorted(drops))]))
    return "\n".join(lines)


# Command line.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in what depends on other arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--summary", action="store_true", help="print the newest of every setting and end"
    )
    parser.add_argument(
        "--quick", action="store_true", help="defaults of a few minutes on two cores"
    )
    parser.add_argument("--model", help="name or directory; the tiny document reader if left out")
    parser.add_argument("--data", nargs="+", help="FILE.jsonl or NAME[:CONFIG[:SPLIT]] each")
    parser.add_argument("--suffix", default=SHORT_ANSWER, help="appended to questions of --data")
    parser.add_argument("--base-url", nargs="+", metavar="SETTING=URL", help="16 bits first")
    parser.add_argument("--count", type=int, default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=1, help="of the tiny reader's questions")
    parser.add_argument(
        "--split",
        choices=("test", "calibration"),
        default="test",
        help="of the tiny reader's questions; settings are chosen on calibration",
    )
    parser.add_argument("--settings", nargs="+", help="DTYPE [KEY=JSON …], quoted; 16 bits first")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--kl-count", type=int, default=20, help="questions of each task for KL")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk in mode chunks")
    parser.add_argument("--batch", type=int, help="questions at once; 50, or 250 on a GPU")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--llm", type=json.loads, default={}, help="further LLM arguments, JSON")
    parser.add_argument("--jobs", type=int, default=1, help="engines at once, on all GPUs")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds to ask at most")
    parser.add_argument("--label", help="name of a record that --summary is to pass over")
    parser.add_argument("--out", type=Path, help="folder of the record")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    if (args.model or args.base_url) and not args.data:
        parser.error("--model and --base-url need --data")
    cuda = torch.cuda.is_available()
    args.batch = args.batch or (250 if cuda else 50)
    standard = OTHER_LLM if args.model else TINY_LLM
    if cuda and not args.model:
        standard = {**standard, **TINY_LLM_ON_CUDA}
    args.llm = {**standard, **args.llm}
    if args.base_url:
        pairs = [pair.partition("=http") for pair in args.base_url]  # options have the sign too
        for (name, sign, _), given in zip(pairs, args.base_url, strict=True):
            if not (name and sign):
                parser.error(f"--base-url needs SETTING=http…, got {given!r}")
        args.base_url = {name: "http" + address for name, _, address in pairs}
        args.settings = list(args.base_url)
        args.modes = [mode for mode in args.modes if mode != "chunks"]  # the server decides
    elif not args.settings:
        args.settings = list(SETTINGS)
        if cuda:
            own = [s for s in SETTINGS[1:] if not any(name in s for name in NOT_ON_CUDA)]
            args.settings = [SETTINGS[0], *STOCK, *own]
    return args


def questions(args: argparse.Namespace, stack: ExitStack) -> tuple[Parts, int]:
    """All questions in parts, and how many they are; drawn meanwhile if there are several jobs."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="accuracy-")))
    if args.data:
        rows = [row for source in args.data for row in load_rows(source, args.count, args.suffix)]
        return Parts.of(rows, folder), len(rows)
    # Spawned, because vLLM's processes must not inherit what drawing leaves in this one.
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"))
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    parts = Parts.tiny(args.count, args.seed, args.split, folder, pool)
    return parts, args.count * len(parts.files[0])


def main(argv: list[str] | None = None) -> None:
    """Measure, or print what was measured."""
    args = parse_args(argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    if args.summary:
        record = accuracy_report.together()
        print_results(record)
        print()
        print(summary_lines(record))
        return
    model = args.model or "tests/tinyvlm"
    if not args.model and not args.base_url:
        from tests.tinyvlm.unpack import model_path

        args.model = str(model_path())
    settings = [Setting.parse(text) for text in args.settings]
    start = {
        **environment(),
        # Settings have spaces, and the line is to be run again.
        "command": f"python -m benchmarks.{NAME} {shlex.join(options(argv or sys.argv[1:]))}",
        "model": "servers" if args.base_url else model,
        "data": args.data or f"tests/tinyvlm, split {args.split}, seed {args.seed}",
        "count": args.count,
        "modes": args.modes,
        "chunk_tokens": args.chunk,
        "llm": args.llm,
    }
    path = record_path("-".join(filter(None, (NAME, args.label))), start["date"], args.out)
    with ExitStack() as stack:
        parts, asked = questions(args, stack)
        units = divide(len(settings), args.modes, len(parts), args.jobs)
        total = asked * len(args.modes) * len(settings)
        bar = stack.enter_context(tqdm(total=total, unit="question", mininterval=1.0))
        results = Results(units, settings, bar)
        saved = time.perf_counter()

        def listen(message: Message) -> None:
            nonlocal saved
            results.take(message)
            if time.perf_counter() - saved > SAVE_EVERY_S:
                save_record(path, {**start, "settings": results.settings_record()})
                saved = time.perf_counter()

        run_units(units, settings, parts, args, listen)
    record = {**start, "settings": results.settings_record()}
    save_record(path, record)
    if not record["settings"][0]["modes"]:
        sys.exit(f"{settings[0].name}: {results.found[0].error or 'no part was finished'}")
    print_results(record)
    try:
        shown = accuracy_report.plot_data(record["settings"])
        if len(shown) > 1:
            accuracy_report.plot(shown, path.with_suffix(".png"))
    except ImportError:
        print("\nno plot: matplotlib is not installed")
    print(f"\n{path}")
    print(summary_lines(record))
    failed = [s["setting"] for s in record["settings"] if "error" in s]
    if failed:
        sys.exit(f"not measured to the end: {', '.join(failed)}")


if __name__ == "__main__":
    main()
