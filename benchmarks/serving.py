"""What a user of stock vLLM gains, and where not: ``python -m benchmarks.serving``.

Each (model, KV cache dtype) gets an engine of its own, which serves all scenarios of
:mod:`benchmarks.serving_scenarios`; ``http`` starts a ``vllm serve`` instead and drives it with
``vllm bench serve``.  A record is rewritten after every cell, so that a run that is cut off keeps
what it had; ``python -m benchmarks.report`` makes the tables and plots of the README from records,
``--summary`` prints the newest record's ratios.

``--dry-run`` runs every scenario on the CPU with a model of two layers, in about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.records import environment, record_path, save_record

DTYPES = (
    "auto",
    "fp8",
    "calibquant1",
    "int4_per_token_head",
    "calibquant2",
    "turboquant_k8v4",
    "turboquant_4bit_nc",
    "turboquant_3bit_nc",
)
IN_PROCESS = (
    "resident",
    "image-chats",
    "long-context",
    "longest-video",
    "no-harm",
    "mix",
    "decode",
    "video",
    "end-to-end",
)
"""Scenarios on an engine in a process of its own, the most telling first."""
SCENARIOS = (*IN_PROCESS, "http")

DRY_MODEL = "internvl-tiny"
DRY_DTYPES = ("auto", "calibquant1")

GRAPH_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
GRAPH_SIZES += [640, 768, 896, 1024]
ENGINE = {
    "max_model_len": 147456,
    "max_num_seqs": 1024,
    "max_num_batched_tokens": 8192,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": GRAPH_SIZES,
    },
}
"""The same for all dtypes.  CUDA graphs without torch.compile: steps of prefill are bound by the
GPU, steps of decoding are graphs, and an engine starts in a third of the time."""
DRY_ENGINE = {
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 4096,
    "enforce_eager": True,
}
READY, GO = "ready", "go\n"


def child(job: dict[str, Any]) -> None:
    """Measure one (model, KV cache dtype); writes a line of JSON for each cell.

    What takes time without the device happens before the parent says go, so that it overlaps with
    the engine before.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _die_with_parent()
    from vllm import LLM  # noqa: F401  imports what an engine needs

    from benchmarks.models import make_model
    from benchmarks.serving_engine import BenchEngine
    from benchmarks.serving_scenarios import DRY_RUN, SCENARIOS, Context, Plan, warm_up

    plan = DRY_RUN if job["dry_run"] else Plan()
    plan = replace(
        plan, **{k: tuple(v) if isinstance(v, list) else v for k, v in job["plan"].items()}
    )

    def write(cell: dict[str, Any]) -> None:
        with Path(job["output"]).open("a", encoding="utf-8") as output:
            output.write(json.dumps(cell) + "\n")

    settings = job["settings"]
    directory = make_model(job["model"], job["directory"], settings["max_model_len"])
    write({"event": READY})
    sys.stdin.readline()
    begin = time.perf_counter()
    engine = BenchEngine(job["model"], directory, job["dtype"], job["pool_bytes"], **settings)
    context = Context(engine, plan, engine.picture(plan.tiles))
    engine.set_budget(None)
    warm_up(context)
    write({"event": "start", "seconds": round(time.perf_counter() - begin, 1)})
    for scenario in job["scenarios"]:
        begin = time.perf_counter()
        cells = SCENARIOS[scenario](context)
        while True:
            start = time.perf_counter()
            try:
                cell = next(cells, None)
            except Exception as error:
                # The other scenarios go on, unless the engine is lost; then they fail likewise.
                traceback.print_exc()
                cell = {"error": f"{type(error).__name__}: {error}"[:500]}
                write({"scenario": scenario, **cell})
                break
            if cell is None:
                break
            cell["cell_s"] = round(time.perf_counter() - start, 1)
            write({"scenario": scenario, **cell})
            if time.perf_counter() - begin > job["scenario_limit_s"]:
                write({"scenario": scenario, "error": "cut off by --limit"})
                break
    engine.close()


def _die_with_parent() -> None:
    """A benchmark that is killed must not leave an engine on the device."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Child:
    """An engine process; it starts at once and touches the device when told to go."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        self.job = job
        stem = f"{job['model']}-{job['dtype']}"
        self.cells_path = folder / f"{stem}.jsonl"
        self.log_path = Path(job["log_dir"]) / f"{stem}.log" if job["log_dir"] else None
        job = {**job, "output": str(self.cells_path), "directory": str(folder / stem)}
        command = [sys.executable, "-m", "benchmarks.serving", "--child", json.dumps(job)]
        self.log = self.log_path.open("w") if self.log_path else None
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT if self.log else None,
            text=True,
            start_new_session=True,
        )
        self._read = 0

    def go(self) -> None:
        """Let it use the device."""
        assert self.process.stdin is not None
        self.process.stdin.write(GO)
        self.process.stdin.flush()

    def new_cells(self) -> list[dict[str, Any]]:
        """What it wrote since the last call."""
        if not self.cells_path.exists():
            return []
        text = self.cells_path.read_text(encoding="utf-8")
        complete = text[self._read : text.rfind("\n") + 1]
        self._read += len(complete)
        return [json.loads(line) for line in complete.splitlines()]

    def stop(self) -> None:
        """End it, and what it may have started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.log:
            self.log.close()


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One job for each engine, in order."""
    settings = {**(DRY_ENGINE if args.dry_run else ENGINE), **args.settings}
    scenarios = [s for s in IN_PROCESS if s in args.scenarios]
    pool = args.pool_gb or (0.02 if args.dry_run else 20.5)
    return [
        {
            "model": model,
            "dtype": dtype,
            "scenarios": scenarios,
            "settings": settings,
            "plan": args.plan,
            "pool_bytes": int(pool * 1e9),
            "dry_run": args.dry_run,
            "scenario_limit_s": args.limit,
            "log_dir": str(args.log_dir) if args.log_dir else None,
        }
        for model in args.models
        for dtype in args.dtypes
        if scenarios
    ]


def run_jobs(args: argparse.Namespace, record: dict[str, Any], path: Path) -> None:
    """Run engines one after the other; the record is saved after each cell."""
    todo = jobs(args)
    if not todo:
        return
    with tempfile.TemporaryDirectory() as folder:
        children: list[Child] = []
        try:
            children.append(Child(todo[0], Path(folder)))
            for number in range(len(todo)):
                # The next one gets ready while this one starts, before anything is measured.
                if number + 1 < len(todo):
                    children.append(Child(todo[number + 1], Path(folder)))
                run_child(children[number], record, path, args.engine_limit)
        finally:
            for one in children:
                one.stop()


def run_child(one: Child, record: dict[str, Any], path: Path, limit_s: float) -> None:
    """Run one engine to its end or to its limit."""
    job = one.job
    base = {"model": job["model"], "dtype": job["dtype"]}
    one.go()
    begin = time.monotonic()
    ended = False
    while not ended:
        ended = one.process.poll() is not None
        late = time.monotonic() - begin > limit_s
        for cell in one.new_cells():
            if cell.get("event") == READY:
                continue
            record["cells" if "scenario" in cell else "engines"].append({**base, **cell})
            save_record(path, record)
            print(describe({**base, **cell}), flush=True)
        if late and not ended:
            record["engines"].append({**base, "event": "cut off by --engine-limit"})
            break
        if not ended:
            time.sleep(0.2)
    if ended and one.process.returncode:
        record["engines"].append({**base, "event": f"exit status {one.process.returncode}"})
    one.stop()
    save_record(path, record)


HTTP_ARGUMENTS = ["--max-model-len", "32768", "--kv-cache-memory-bytes", str(20 * 10**9)]
DRY_HTTP_ARGUMENTS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)]
DRY_HTTP_ARGUMENTS += ["--enforce-eager", "--max-num-seqs", "8"]


def run_http(args: argparse.Namespace, record: dict[str, Any], path: Path) -> None:
    """One server for each (model, KV cache dtype)."""
    from benchmarks import serving_http
    from benchmarks.models import make_model

    load = serving_http.DRY_LOAD if args.dry_run else serving_http.Load()
    arguments = DRY_HTTP_ARGUMENTS if args.dry_run else HTTP_ARGUMENTS
    arguments = [*arguments, "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    record["http_arguments"] = arguments
    for model in args.models:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                directory = make_model(model, folder)
                log = (args.log_dir or directory) / f"http-{model}-{dtype}.log"
                base = {"model": model, "dtype": dtype, "scenario": "http"}
                begin = time.monotonic()
                cells = serving_http.measure(directory, dtype, arguments, load, log)
                try:
                    for cell in cells:
                        record["cells"].append({**base, **cell})
                        save_record(path, record)
                        print(describe({**base, **cell}), flush=True)
                        if time.monotonic() - begin > args.engine_limit:
                            break
                except RuntimeError as error:
                    record["cells"].append({**base, "error": str(error)})
                    print(describe(record["cells"][-1]), flush=True)
                finally:
                    cells.close()
    save_record(path, record)


def describe(cell: dict[str, Any]) -> str:
    """One line for the terminal, without raw samples."""
    short = {k: v for k, v in cell.items() if not isinstance(v, list)}
    return " ".join(f"{k}={v}" for k, v in short.items())


def words(text: str) -> list[str]:
    """Parse a list with commas."""
    return [word for word in text.split(",") if word]


def main(argv: list[str] | None = None) -> Path | None:
    """Command line; returns the record, if one was made."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=words, help="names of benchmarks.models")
    parser.add_argument("--dtypes", type=words, help="KV cache dtypes, stock first")
    parser.add_argument("--scenarios", type=words, default=[*IN_PROCESS], help=",".join(SCENARIOS))
    parser.add_argument("--budgets", type=words, help="KV budgets in GB, the first one at length")
    parser.add_argument("--limit", type=float, default=120, help="seconds a scenario may take")
    parser.add_argument("--engine-limit", type=float, default=900, help="seconds of an engine")
    parser.add_argument("--pool-gb", type=float, help="the engines' pool: the largest budget")
    parser.add_argument("--plan", type=json.loads, default={}, help="other numbers of the plan")
    parser.add_argument("--settings", type=json.loads, default={}, help="further engine arguments")
    parser.add_argument("--run", help="name that joins records of one run on several devices")
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--log-dir", type=Path, help="folder of the engines' logs")
    parser.add_argument("--dry-run", action="store_true", help="everything, small, on the CPU")
    parser.add_argument("--summary", action="store_true", help="ratios of the newest record")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child)
        return None
    if args.summary:
        from benchmarks.serving_summary import print_summary

        print_summary()
        return None
    unknown = [s for s in args.scenarios if s not in SCENARIOS]
    if unknown:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    args.models = args.models or [DRY_MODEL if args.dry_run else "internvl3-8b"]
    args.dtypes = args.dtypes or [*(DRY_DTYPES if args.dry_run else DTYPES)]
    if args.budgets:
        args.plan = {"budgets": [float(b) for b in args.budgets], **args.plan}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record: dict[str, Any] = {
        **environment(),
        "run": args.run,
        "dry_run": args.dry_run,
        "settings": {**(DRY_ENGINE if args.dry_run else ENGINE), **args.settings},
        "engines": [],
        "cells": [],
    }
    record["run"] = args.run or record["date"]
    # Where results go is no part of what was measured.
    for folder in (args.out, args.log_dir):
        for option in ("--out", "--log-dir"):
            record["command"] = record["command"].replace(f" {option} {folder}", "")
    path = record_path("serving", record["date"], args.out)
    save_record(path, record)
    run_jobs(args, record, path)
    if "http" in args.scenarios:
        run_http(args, record, path)
    print(path)
    return path


if __name__ == "__main__":
    main()
