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
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy_data import (
    SHORT_ANSWER,
    Row,
    batches,
    load_rows,
    other_questions,
    tiny_rows,
)
from benchmarks.accuracy_engines import Answer, Engine, InProcess, Server, Setting
from benchmarks.accuracy_metrics import agreement, divergence, mean_drop, wilson
from benchmarks.records import newest_record, print_table, write_record

NAME = "accuracy"
MODES = ("decode", "prefix-hit", "chunks")
WIDTHS = ("auto", "calibquant4", "calibquant2", "calibquant1")
"""16 bits, which all are compared with, and the defaults of every width."""

PROFILES = tuple(
    f"calibquant1 profile=tests/tinyvlm/profiles/bits{bits}.safetensors"
    for bits in ("1", "1.25", "1.5")
)
"""Learned bit planes of the tiny reader (``make profiles``)."""

SETTINGS = (
    *WIDTHS,
    *PROFILES,
    "calibquant2 preset=calibquant-paper",
    "calibquant1 preset=calibquant-paper",
    "calibquant1 preset=calibquant-paper calibration=false",
    "calibquant1 range_estimator=quantile",  # the paper's first version
    "calibquant1 range_estimator=unbiased-slope",
    "calibquant1 range_estimator=two-means",
    "calibquant1 calibration=true",
    "calibquant1 layers_16bit=[0]",
)
QUICK = {
    "count": 8,
    "kl_count": 2,
    "settings": ["auto", "calibquant2", *PROFILES, "calibquant1"],
    "modes": list(MODES[:2]),
}
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes have these cores too
}
TINY_LLM = {"dtype": "bfloat16", "max_model_len": 2048, "kv_cache_memory_bytes": 512 << 20}
OTHER_LLM = {"dtype": "bfloat16", "max_model_len": 8192}


# Measuring.


def ask_all(
    engine: Engine, rows: list[Row], mode: str, batch_size: int, kl_count: int, bar: tqdm
) -> tuple[list[Answer], dict[int, list[dict[int, float]]]]:
    """Answers to all rows in one mode, and distributions along the true answer of some.

    Parameters
    ----------
    engine
        Whom to ask.
    rows
        The questions.
    mode
        One of :data:`MODES`.
    batch_size
        Questions in a batch.
    kl_count
        Rows of each task with distributions, by row; none of an engine without them.
    bar
        Moves by one for each answer.
    """
    others = other_questions(rows)
    taken: dict[str, int] = {}
    chosen = set()
    if isinstance(engine, InProcess):
        for i, row in enumerate(rows):
            taken[row.task] = taken.get(row.task, 0) + 1
            if taken[row.task] <= kl_count:
                chosen.add(i)
    answers: dict[int, Answer] = {}
    distributions: dict[int, list[dict[int, float]]] = {}
    for batch in batches(rows, batch_size):
        engine.forget()
        if mode == "prefix-hit":
            engine.look([rows[i].look(others[i]) for i in batch])
        asked = engine.ask([rows[i].chat for i in batch])
        answers.update(zip(batch, asked, strict=True))
        forced = [i for i in batch if i in chosen]
        if forced and isinstance(engine, InProcess):
            if mode != "prefix-hit":
                engine.forget()
            found = engine.distributions(
                [rows[i].chat for i in forced], [rows[i].answers[0] for i in forced]
            )
            distributions.update(zip(forced, found, strict=True))
        bar.update(len(batch))
    return [answers[i] for i in range(len(rows))], distributions


def measure(setting: Setting, rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    """Answers and distributions of every mode under one setting, in this process."""
    begin = time.perf_counter()
    logging.getLogger("vllm_calibquant").setLevel(logging.ERROR)
    raw: dict[str, Any] = {"modes": {}}
    plain = [mode for mode in args.modes if mode != "chunks"]
    chunked = [mode for mode in args.modes if mode == "chunks"]
    total = len(rows) * len(args.modes)
    with tqdm(total=total, desc=setting.name, unit="question", mininterval=1.0) as bar:
        for modes in filter(None, (plain, chunked)):
            with engine_for(setting, args, cut=modes == chunked) as engine:
                for mode in modes:
                    raw["modes"][mode] = ask_all(engine, rows, mode, args.batch, args.kl_count, bar)
                if isinstance(engine, InProcess):
                    raw["bytes_per_visual_token"] = engine.bytes_per_visual_token
    raw["seconds"] = round(time.perf_counter() - begin, 1)
    return raw


def engine_for(setting: Setting, args: argparse.Namespace, cut: bool) -> InProcess | Server:
    """Whom to ask under a setting; ``cut`` if prompts are to be computed in chunks."""
    if args.base_url:
        return Server(args.base_url[setting.name], args.max_tokens, args.batch)
    length = args.llm["max_model_len"]
    schedule: dict[str, Any]
    if cut:
        # Of every prompt alike: a smaller budget of a step would cut each at another place.
        schedule = {"long_prefill_token_threshold": args.chunk}
    else:
        schedule = {"enable_chunked_prefill": False}
    return InProcess(
        args.model,
        setting,
        args.max_tokens,
        **{
            "max_num_batched_tokens": max(8192, length),
            "max_num_seqs": args.batch,
            "limit_mm_per_prompt": {"image": 1 if args.data else 2},
            "use_tqdm_on_load": False,
            "enforce_eager": not torch.cuda.is_available(),
            **schedule,
            **args.llm,
        },
    )


def measure_all(
    settings: list[Setting], rows: list[Row], args: argparse.Namespace
) -> Iterable[dict[str, Any]]:
    """Raw results of each setting; on a GPU in processes of their own, to get its memory back."""
    if not torch.cuda.is_available() or args.base_url:
        yield from (measure(setting, rows, args) for setting in settings)
        return
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for setting in settings:
            yield pool.submit(measure, setting, rows, args).result()


# Results.


def by_task(rows: list[Row], outcomes: list[bool]) -> dict[str, list[bool]]:
    """Outcomes of each task, in the order of the rows."""
    tasks: dict[str, list[bool]] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        tasks.setdefault(row.task, []).append(outcome)
    return tasks


def compare(rows: list[Row], reference: Any, raw: Any) -> dict[str, Any]:
    """Numbers of one mode of a setting, beside those of the reference."""
    (first, first_p), (answers, p) = reference, raw
    right = by_task(rows, [r.is_right(a.text) for r, a in zip(rows, answers, strict=True)])
    truth = by_task(rows, [r.is_right(a.text) for r, a in zip(rows, first, strict=True)])
    tasks = {}
    for task, outcomes in right.items():
        low, high = wilson(sum(outcomes), len(outcomes))
        tasks[task] = {
            "n": len(outcomes),
            "exact_match": round(100 * sum(outcomes) / len(outcomes), 2),
            "interval": [round(low, 2), round(high, 2)],
            "outcomes": "".join(str(int(o)) for o in outcomes),
        }
    drop, half = mean_drop(truth, right)
    steps = [divergence(x, y) for i in p for x, y in zip(first_p[i], p[i], strict=True)]
    hits = [a.hit for a in answers if a.hit is not None]
    return {
        "tasks": tasks,
        "mean": round(100 * mean(mean(outcomes) for outcomes in right.values()), 2),
        "drop": round(drop, 2),
        "drop_half_interval": round(half, 2),
        "agreement": round(agreement([a.tokens for a in first], [a.tokens for a in answers]), 2),
        "kl": float(f"{mean(steps):.4g}") if steps else None,
        "kl_tokens": len(steps),
        "mean_hit_tokens": round(mean(hits), 1) if hits else None,
    }


def print_results(record: dict[str, Any]) -> None:
    """Print a Markdown table for each mode."""
    for mode in record["modes"]:
        tasks = list(record["settings"][0]["modes"][mode]["tasks"])
        body = []
        for setting in record["settings"]:
            result = setting["modes"][mode]
            cells = []
            for task in tasks:
                found = result["tasks"][task]
                low, high = found["interval"]
                cells.append(f"{found['exact_match']:.1f} ({low:.0f}–{high:.0f})")
            size, kl = setting.get("bytes_per_visual_token"), result["kl"]
            body.append(
                [
                    setting["setting"],
                    "" if size is None else f"{size:.0f}",
                    *cells,
                    f"{result['mean']:.1f}",
                    f"{result['drop']:.1f} ± {result['drop_half_interval']:.1f}",
                    f"{result['agreement']:.1f}",
                    "" if kl is None else f"{kl:.4f}",
                ]
            )
        print(f"\nMode {mode}: exact match in %, n = {record['count']} a task\n")
        header = ["setting", "bytes a visual token", *tasks, "mean"]
        print_table([*header, "points below 16 bits", "agreement, %", "KL, nats"], body)


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


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw exact match against bytes of a visual token, a panel for each mode."""
    from matplotlib import pyplot as plt

    modes, settings = record["modes"], record["settings"]
    figure, panels = plt.subplots(
        1,
        len(modes),
        figsize=(1 + 4 * len(modes), 5 + 0.16 * len(settings)),
        sharey=True,
        squeeze=False,
    )
    widths = [s for s in settings if s["setting"] in WIDTHS]
    learned = [s for s in settings if "profile=" in s["setting"]]
    lines = [sorted(part, key=lambda s: s["bytes_per_visual_token"]) for part in (widths, learned)]
    sizes = sorted({round(s["bytes_per_visual_token"]) for s in settings})
    for mode, axes in zip(modes, panels[0], strict=True):
        for line, style in zip(lines, ("-", "--"), strict=True):
            axes.plot(
                [s["bytes_per_visual_token"] for s in line],
                [s["modes"][mode]["mean"] for s in line],
                style,
                color="lightgrey",
                zorder=1,
            )
        beside: dict[float, int] = {}
        for i, setting in enumerate(settings):
            size, result = setting["bytes_per_visual_token"], setting["modes"][mode]
            # Settings of one width have the same bytes: stand them side by side.
            place = beside[size] = beside.get(size, -1) + 1
            axes.errorbar(
                size * 1.09**place,
                result["mean"],
                yerr=result["drop_half_interval"],
                color=f"C{i}",
                marker="o" if setting in widths else "*" if setting in learned else "D",
                linestyle="none",
                label=setting["setting"],
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=60)
        axes.minorticks_off()
        axes.set_xlabel("bytes of KV cache a visual token, all layers")
        axes.set_title(f"mode {mode}", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("exact match, mean over tasks, %")
    figure.suptitle(f"{record['model']}, {record['count']} questions a task", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Command line.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in what depends on other arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--summary", action="store_true", help="print the newest record and end")
    parser.add_argument("--quick", action="store_true", help="a few minutes on two CPU cores")
    parser.add_argument("--model", help="name or directory; the tiny document reader if left out")
    parser.add_argument("--data", nargs="+", help="FILE.jsonl or NAME[:CONFIG[:SPLIT]] each")
    parser.add_argument("--suffix", default=SHORT_ANSWER, help="appended to questions of --data")
    parser.add_argument("--base-url", nargs="+", metavar="SETTING=URL", help="16 bits first")
    parser.add_argument("--count", type=int, default=100, help="questions of each task")
    parser.add_argument("--seed", type=int, default=1, help="of the tiny reader's questions")
    parser.add_argument("--settings", nargs="+", help="DTYPE [KEY=JSON …], quoted; 16 bits first")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--kl-count", type=int, default=20, help="questions of each task for KL")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk in mode chunks")
    parser.add_argument("--batch", type=int, default=50, help="questions at once")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--llm", type=json.loads, default={}, help="further LLM arguments, JSON")
    parser.add_argument("--label", help="name of a record that --summary is to pass over")
    parser.add_argument("--out", type=Path, help="folder of the record")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    if (args.model or args.base_url) and not args.data:
        parser.error("--model and --base-url need --data")
    args.llm = {**(OTHER_LLM if args.model else TINY_LLM), **args.llm}
    if args.base_url:
        args.base_url = dict(pair.split("=", 1) for pair in args.base_url)
        args.settings = list(args.base_url)
        args.modes = [mode for mode in args.modes if mode != "chunks"]  # the server decides
    elif not args.settings:
        fp8 = ["fp8"] if torch.cuda.is_available() else []
        args.settings = [SETTINGS[0], *fp8, *SETTINGS[1:]]
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, or print what was measured."""
    args = parse_args(argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.summary:
        record = newest_record(NAME)
        print_results(record)
        print()
        print(summary_lines(record))
        return
    if args.data:
        loose = [load_rows(source, args.count, args.suffix) for source in args.data]
        rows = [row for part in loose for row in part]
    else:
        rows = tiny_rows(args.count, args.seed)
    model = args.model or "tests/tinyvlm"
    if not args.model and not args.base_url:
        from tests.tinyvlm.unpack import model_path

        args.model = str(model_path())
    settings = [Setting.parse(text) for text in args.settings]
    results: list[dict[str, Any]] = []
    reference: dict[str, Any] = {}
    for setting, raw in zip(settings, measure_all(settings, rows, args), strict=True):
        modes = raw.pop("modes")
        reference = reference or modes
        results.append(
            {
                "setting": setting.name,
                "bits": setting.bits,
                **raw,
                "modes": {m: compare(rows, reference[m], found) for m, found in modes.items()},
            }
        )
    record = {
        # Settings have spaces, and the line is to be run again.
        "command": f"python -m benchmarks.{NAME} {shlex.join(argv or sys.argv[1:])}",
        "model": "servers" if args.base_url else model,
        "data": args.data or f"tests/tinyvlm, split test, seed {args.seed}",
        "count": args.count,
        "modes": args.modes,
        "chunk_tokens": args.chunk,
        "llm": args.llm,
        "settings": results,
    }
    path = write_record("-".join(filter(None, (NAME, args.label))), record, args.out)
    print_results(record)
    try:
        if all("bytes_per_visual_token" in result for result in results):
            plot(record, path.with_suffix(".png"))
    except ImportError:
        print("\nno plot: matplotlib is not installed")
    print(f"\n{path}")
    print(summary_lines(record))


if __name__ == "__main__":
    main()
