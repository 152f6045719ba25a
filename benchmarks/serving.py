"""What a user of stock vLLM gains, and where not: ``python -m benchmarks.serving``.

Each (model, KV cache dtype) gets an engine of its own, which serves all scenarios of
:mod:`benchmarks.serving_scenarios`; ``http`` starts ``vllm serve`` instead, for a dtype and beside
it for the first one, and drives both in turns with ``vllm bench serve``.  With ``--devices 0,1``
each of these GPUs takes the next of the list when it is free.  A record is rewritten after every
cell, so that a run that is cut off keeps what it had; ``python -m benchmarks.report`` makes the
tables and plots of the README from records, ``--summary`` prints the newest record's ratios.

``--dry-run`` runs every scenario, ``http`` included, on the CPU with a model of two layers.
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
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import serving_http
from benchmarks.records import environment, gpu_names, record_path, save_record
from benchmarks.shapes import NAMES

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
    "compilation_config": {"cudagraph_capture_sizes": GRAPH_SIZES},
}
"""The same for all dtypes: vLLM's defaults, torch.compile included, and graphs of large batches."""
DRY_ENGINE = {
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 4096,
    "enforce_eager": True,
}
READY, GO = "ready", "go\n"
PINNED = "CUDA_VISIBLE_DEVICES"


def child(job: dict[str, Any]) -> None:
    """Measure one (model, KV cache dtype); writes a line of JSON for each cell.

    What takes time without the device happens before the parent says go, so that it overlaps with
    the engine before.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    _die_with_parent()
    from vllm import LLM  # noqa: F401  imports what an engine needs

    from benchmarks.models import cache_settings, make_model
    from benchmarks.serving_engine import BenchEngine
    from benchmarks.serving_scenarios import DRY_RUN, SCENARIOS, Context, Plan, warm_up

    plan = DRY_RUN if job["dry_run"] else Plan()
    plan = replace(
        plan, **{k: tuple(v) if isinstance(v, list) else v for k, v in job["plan"].items()}
    )

    def write(cell: dict[str, Any]) -> None:
        with Path(job["output"]).open("a", encoding="utf-8") as output:
            output.write(json.dumps(cell) + "\n")

    settings, begin = job["settings"], time.perf_counter()
    directory = make_model(job["model"], job["directory"], settings["max_model_len"])
    cache_settings(job["dtype"], directory)  # a profile is there when the engine asks
    print(f"model and settings are there after {time.perf_counter() - begin:.1f} s", flush=True)
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


class Engine:
    """An engine process; it starts at once and touches the device when told to go."""

    def __init__(self, job: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
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
            env=env,
        )
        self._read = 0

    def run(self) -> Iterator[dict[str, Any]]:
        """Cells and events, to its end or to its limit."""
        assert self.process.stdin is not None
        self.process.stdin.write(GO)
        self.process.stdin.flush()
        begin = time.monotonic()
        ended = False
        while not ended:
            ended = self.process.poll() is not None
            late = time.monotonic() - begin > self.job["limit_s"]
            yield from (cell for cell in self._new_cells() if cell.get("event") != READY)
            if late and not ended:
                yield {"event": "cut off by --engine-limit"}
                return
            if not ended:
                time.sleep(0.2)
        if self.process.returncode:
            yield {"event": f"exit status {self.process.returncode}"}

    def _new_cells(self) -> list[dict[str, Any]]:
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


class HttpServers:
    """``vllm serve`` for some KV cache dtypes, and their client.

    The client starts at once, the servers when they may.
    """

    def __init__(self, job: dict[str, Any], folder: Path, env: dict[str, str]) -> None:
        from benchmarks.models import cache_settings, make_model

        self.job = job
        stem = f"http-{job['model']}-{job['dtype']}"
        self.directory = make_model(job["model"], folder / stem)
        logs = Path(job["log_dir"] or self.directory)
        self.client = serving_http.Client(logs / f"{stem}-client.log")
        arguments = job["arguments"]
        if not job["dry_run"]:
            share = serving_http.MEMORY_SHARE / len(job["dtypes"])
            arguments = [*arguments, "--gpu-memory-utilization", f"{share:.2f}"]
        self.servers = {
            dtype: serving_http.Server(
                self.directory,
                [*serving_http.as_options(cache_settings(dtype, self.directory)), *arguments],
                logs / f"{stem}-{dtype}.log",
                env,
            )
            for dtype in job["dtypes"]
        }

    def run(self) -> Iterator[dict[str, Any]]:
        """Cells, to their end or to their limit."""
        job = self.job
        load = serving_http.DRY_LOAD if job["dry_run"] else serving_http.Load()
        load = load._replace(
            starts=job["plan"].get("http_starts", load.starts),
            repeats=job["plan"].get("http_repeats", load.repeats),
            loads=tuple(job["plan"].get("http_loads", load.loads)),
        )
        try:
            for cell in serving_http.measure(
                self.servers, self.client, self.directory, job["model"], load, job["limit_s"]
            ):
                yield {"scenario": "http", **cell}
        except serving_http.CutOff as error:
            yield {"event": str(error)}
        except (RuntimeError, OSError) as error:
            yield {"scenario": "http", "error": str(error)}

    def stop(self) -> None:
        """End them all."""
        self.client.stop()
        for server in self.servers.values():
            server.stop()


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One job for each engine, in order; behind them HTTP, each dtype beside the first one."""
    every = {
        "settings": {**(DRY_ENGINE if args.dry_run else ENGINE), **args.settings},
        "plan": args.plan,
        "pool_bytes": int((args.pool_gb or (0.02 if args.dry_run else 20.5)) * 1e9),
        "arguments": [
            *(serving_http.DRY_ARGUMENTS if args.dry_run else serving_http.ARGUMENTS),
            *serving_http.ONE_IMAGE,
            *serving_http.as_options(args.settings),
        ],
        "dry_run": args.dry_run,
        "limit_s": args.engine_limit,
        "scenario_limit_s": args.limit,
        "log_dir": str(args.log_dir) if args.log_dir else None,
    }
    in_process = [s for s in IN_PROCESS if s in args.scenarios]
    todo = [
        {"model": model, "dtype": dtype, "scenarios": in_process, **every}
        for model in args.models
        for dtype in args.dtypes
        if in_process
    ]
    if "http" not in args.scenarios:
        return todo
    first, *others = args.dtypes
    return todo + [
        {"model": model, "dtype": dtypes[-1], "dtypes": dtypes, "scenarios": ["http"], **every}
        for model in args.models
        for dtypes in ([[first, other] for other in others] or [[first]])
    ]


@dataclass
class Benchmark:
    """Jobs, the GPUs that share them, and the record that all of them add to."""

    todo: deque[dict[str, Any]]
    devices: list[str | None]
    """Values of ``CUDA_VISIBLE_DEVICES``; None for what there is."""
    record: dict[str, Any]
    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started: list[Engine | HttpServers] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)

    def run(self) -> None:
        """All jobs, each on the first device that is free for it."""
        with tempfile.TemporaryDirectory() as folder:
            workers = [
                threading.Thread(target=self._work, args=(device, Path(folder)), daemon=True)
                for device in self.devices
            ]
            try:
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            finally:
                with self._lock:  # nothing is started from here on
                    self.todo.clear()
                    for one in self._started:
                        one.stop()
        if self._errors:
            raise self._errors[0]

    def _work(self, device: str | None, folder: Path) -> None:
        try:
            current = self._start(device, folder)
            while current is not None:
                # The next one gets ready while this one starts, before anything is measured,
                # unless another device could be free for it first.
                ahead = self._start(device, folder, at_least=len(self.devices))
                with closing(current.run()) as cells:
                    for cell in cells:
                        self._note(current.job, device, cell)
                current.stop()
                current = ahead or self._start(device, folder)
        except BaseException as error:  # the main thread raises it
            self._errors.append(error)

    def _start(
        self, device: str | None, folder: Path, at_least: int = 1
    ) -> Engine | HttpServers | None:
        with self._lock:
            if len(self.todo) < at_least:
                return None
            job = self.todo.popleft()
            env = dict(os.environ) if device is None else {**os.environ, PINNED: device}
            kind = HttpServers if job["scenarios"] == ["http"] else Engine
            one = kind(job, folder, env)
            self._started.append(one)
            return one

    def _note(self, job: dict[str, Any], device: str | None, cell: dict[str, Any]) -> None:
        cell = {"model": job["model"], "dtype": job["dtype"], **cell}
        if device is not None:
            cell["gpu"] = device
        with self._lock:
            self.record["cells" if "scenario" in cell else "engines"].append(cell)
            save_record(self.path, self.record)
            print(describe(cell), flush=True)


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
    parser.add_argument(
        "--dtypes",
        type=words,
        help="KV cache dtypes, stock first; calibquant1+profile1.25 has a profile of so many bits, "
        "calibquant1+hadamard the transform",
    )
    parser.add_argument("--scenarios", type=words, help=",".join(SCENARIOS))
    parser.add_argument("--budgets", type=words, help="KV budgets in GB, the first one at length")
    parser.add_argument("--limit", type=float, default=120, help="seconds a scenario may take")
    parser.add_argument("--engine-limit", type=float, default=900, help="seconds of an engine")
    parser.add_argument("--pool-gb", type=float, help="the engines' pool: the largest budget")
    parser.add_argument("--plan", type=json.loads, default={}, help="other numbers of the plan")
    parser.add_argument("--settings", type=json.loads, default={}, help="further engine arguments")
    parser.add_argument("--devices", type=words, help="GPUs that share the engines, as 0,1")
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
    if args.scenarios is None:
        args.scenarios = [*(SCENARIOS if args.dry_run else IN_PROCESS)]
    unknown = [s for s in args.scenarios if s not in SCENARIOS]
    if unknown or not args.scenarios:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    args.models = args.models or [DRY_MODEL if args.dry_run else "internvl3-8b"]
    unknown = [name for name in args.models if name not in NAMES]
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    args.dtypes = args.dtypes or [*(DRY_DTYPES if args.dry_run else DTYPES)]
    if args.budgets:
        args.plan = {"budgets": [float(b) for b in args.budgets], **args.plan}
    names = {device: gpu_names().get(device) for device in args.devices or ()}
    if len(set(names.values())) > 1:
        parser.error(f"--devices must be of one kind to be compared: {names}")
    todo = jobs(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record: dict[str, Any] = {
        **environment(),
        "run": args.run,
        "dry_run": args.dry_run,
        "gpus": args.devices,
        "settings": todo[0]["settings"],
        "http_arguments": todo[0]["arguments"],
        "http_environment": {
            name: os.environ.get(name, value) for name, value in serving_http.ENVIRONMENT.items()
        },
        "engines": [],
        "cells": [],
    }
    record["run"] = args.run or record["date"]
    record["device"] = next(filter(None, names.values()), record["device"])
    path = record_path("serving", record["date"], args.out)
    if args.log_dir:
        args.log_dir.mkdir(parents=True, exist_ok=True)
    save_record(path, record)
    Benchmark(deque(todo), args.devices or [None], record, path).run()
    if not record["cells"]:
        path.unlink()
        sys.exit("nothing was measured: with --log-dir DIR, the engines' logs say why")
    print(path)
    return path


if __name__ == "__main__":
    main()
