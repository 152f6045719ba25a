"""Asking many engines at once: a process for each setting, spread over the GPUs that there are.

A small model leaves a GPU idle while Python prepares the next step, so the way to many answers is
many engines.  Processes report part by part (:class:`benchmarks.accuracy_data.Parts`); whoever
listens can write down what there is at any time, and a setting that fails takes no other along.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Literal, NamedTuple

from benchmarks.accuracy_data import PART, Parts, Row, batches, other_questions
from benchmarks.accuracy_engines import Answer, Engine, InProcess, Server, Setting

CHUNKS = "chunks"
"""The mode that needs an engine of its own."""

Step = dict[int, float]
"""Log-probabilities of the most likely tokens."""


class Outcome(NamedTuple):
    """What became of one question."""

    task: str
    right: bool
    tokens: tuple[Hashable, ...]
    hit: int | None
    steps: list[Step] | None
    """Distributions along the true answer, of some questions."""


@dataclass(frozen=True)
class Unit:
    """What one engine is asked."""

    setting: int
    modes: tuple[str, ...]
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Message:
    """What a process reports of its unit."""

    unit: int
    kind: Literal["size", "asked", "part", "done", "error"]
    content: Any = None


@dataclass
class Found:
    """What is known of a setting so far."""

    modes: dict[str, dict[int, list[Outcome]]] = field(default_factory=dict)
    """By mode and part."""
    bytes_per_visual_token: float | None = None
    seconds: float = 0.0
    error: str | None = None


def divide(settings: int, modes: list[str], parts: int, jobs: int) -> list[Unit]:
    """Units of a measurement: more than one for a setting only if there are jobs to spare."""
    groups = [tuple(mode for mode in modes if (mode == CHUNKS) == cut) for cut in (False, True)]
    groups = [group for group in groups if group]
    shards = min(max(1, jobs // (settings * len(groups))), parts)
    return [
        Unit(setting, group, tuple(range(shard, parts, shards)))
        for group in groups
        for setting in range(settings)
        for shard in range(shards)
    ]


def ask_part(
    engine: Engine,
    rows: list[Row],
    mode: str,
    batch_size: int,
    kl_count: int,
    asked: Callable[[int], None],
) -> list[Outcome]:
    """Outcomes of all rows in one mode.

    Parameters
    ----------
    engine
        Whom to ask.
    rows
        The questions.
    mode
        One of :data:`benchmarks.accuracy.MODES`.
    batch_size
        Questions in a batch.
    kl_count
        Rows of each task with distributions; none of an engine without them.
    asked
        Called with the number of answers of each batch.
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
    steps: dict[int, list[Step]] = {}
    for batch in batches(rows, batch_size):
        engine.forget()
        if mode == "prefix-hit":
            engine.look([rows[i].look(others[i]) for i in batch])
        answers.update(zip(batch, engine.ask([rows[i].chat for i in batch]), strict=True))
        forced = [i for i in batch if i in chosen]
        if forced and isinstance(engine, InProcess):
            if mode != "prefix-hit":
                engine.forget()
            found = engine.distributions(
                [rows[i].chat for i in forced], [rows[i].answers[0] for i in forced]
            )
            steps.update(zip(forced, found, strict=True))
        asked(len(batch))
    return [
        Outcome(row.task, row.is_right(a.text), a.tokens, a.hit, steps.get(i))
        for i, row in enumerate(rows)
        for a in (answers[i],)
    ]


def measure(
    unit: Unit,
    setting: Setting,
    parts: Parts,
    args: argparse.Namespace,
    report: Callable[[Any, Any], None],
) -> None:
    """Ask one engine in this process; see :class:`Message` for what is reported."""
    begin = time.perf_counter()
    logging.getLogger("vllm_calibquant").setLevel(logging.ERROR)
    with _engine(setting, args, cut=CHUNKS in unit.modes) as engine:
        if isinstance(engine, InProcess):
            report("size", engine.bytes_per_visual_token)
        for part in unit.parts:
            rows = parts[part]
            for mode in unit.modes:
                found = ask_part(
                    engine,
                    rows,
                    mode,
                    args.batch,
                    args.kl_count - part * PART,
                    lambda n: report("asked", n),
                )
                report("part", (mode, part, found))
    report("done", round(time.perf_counter() - begin, 1))


def _engine(setting: Setting, args: argparse.Namespace, cut: bool) -> InProcess | Server:
    """Whom to ask under a setting; ``cut`` if prompts are to be computed in chunks."""
    if args.base_url:
        return Server(args.base_url[setting.name], args.max_tokens, args.batch)
    import torch

    length = args.llm["max_model_len"]
    schedule: dict[str, Any]
    if cut:
        # Of every prompt alike: a smaller budget of a step would cut each at another place.
        schedule = {"long_prefill_token_threshold": args.chunk}
    else:
        schedule = {"enable_chunked_prefill": False}
    if torch.cuda.is_available():
        here = -(-args.jobs // max(len(devices()), 1))
        schedule["gpu_memory_utilization"] = round(0.9 / here, 3)
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


def devices() -> list[str]:
    """Names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


Work = Callable[[Unit, Setting, Parts, argparse.Namespace, Callable[[Any, Any], None]], None]
"""Does what a unit asks for, and reports; :func:`measure` unless a test says otherwise."""


def run_units(
    units: list[Unit],
    settings: list[Setting],
    parts: Parts,
    args: argparse.Namespace,
    listen: Callable[[Message], None],
    work: Work = measure,
) -> None:
    """Run all units, as many at once as there are jobs, until ``args.limit`` seconds are over.

    With one job and no GPU, and with servers, they run here, one after the other, to their end.
    """
    gpus = [] if args.base_url else devices()
    if args.base_url or (args.jobs == 1 and not gpus):
        for i, unit in enumerate(units):

            def report(kind: Any, content: Any, i: int = i) -> None:
                listen(Message(i, kind, content))

            try:
                work(unit, settings[unit.setting], parts, args, report)
            except Exception as error:
                report("error", _sentence(error))
                _clean_up()
        return
    end = time.perf_counter() + args.limit
    context = get_context("spawn")
    inbox = context.Queue()
    waiting = list(enumerate(units))
    running: dict[int, tuple[Any, str | None]] = {}
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        while (waiting or running) and time.perf_counter() < end:
            while waiting and len(running) < args.jobs:
                i, unit = waiting.pop(0)
                gpu = None
                if gpus:
                    gpu = min(gpus, key=lambda name: sum(on == name for _, on in running.values()))
                    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # what the new process starts with
                task = (work, inbox, i, unit, settings[unit.setting], parts, args)
                process = context.Process(target=_run, args=task)
                process.start()
                running[i] = process, gpu
            try:
                message = inbox.get(timeout=1.0)
            except queue.Empty:
                for i, (process, _) in list(running.items()):
                    if process.exitcode is not None:  # without a word, which would be in the queue
                        del running[i]
                        listen(Message(i, "error", f"ended with exit code {process.exitcode}"))
                continue
            if message.kind in ("done", "error"):
                running.pop(message.unit)[0].join(30)
            listen(message)
    finally:
        for process, _ in running.values():
            process.terminate()
        if own is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = own


def _run(
    work: Work,
    inbox: Any,
    i: int,
    unit: Unit,
    setting: Setting,
    parts: Parts,
    args: argparse.Namespace,
) -> None:
    def report(kind: Any, content: Any) -> None:
        inbox.put(Message(i, kind, content))

    try:
        work(unit, setting, parts, args, report)
    except Exception as error:
        report("error", _sentence(error))


def _sentence(error: Exception) -> str:
    """The last line of an error: where vLLM wraps one, that is the reason.

    Pydantic's last line is an address, behind the reason.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("For further information visit")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:400]


def _clean_up() -> None:
    """Leave no half of an engine behind for the next."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
