"""The scenario ``http`` of :mod:`benchmarks.serving`: ``vllm serve`` under ``vllm bench serve``.

What must not become worse, and what images gain, through everything that a user has in between:
HTTP server, chat template, tokenizer, image processor.  Engine settings are vLLM's defaults,
torch.compile and all CUDA graphs included.

What goals look at is short, and a shared host noisy: so the servers of two KV cache dtypes are up
at once and asked the same in turns, several times.  Nor is one start of a server like another.  So
all is done with several starts, and figures are medians over all of it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import random
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ARGUMENTS = ["--max-model-len", "32768", "--kv-cache-memory-bytes", str(12 * 10**9)]
MEMORY_SHARE = 0.9
"""Of a GPU, for all servers that are up at once."""
DRY_ARGUMENTS = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)]
DRY_ARGUMENTS += ["--enforce-eager", "--max-num-seqs", "8"]
ONE_IMAGE = ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""Of all servers, unless the caller's has other values: glibc keeps memory that was freed.

Of itself it may return the tens of megabytes of a prepared image to the system after each request,
and then thousands of page faults come with the next, or it may keep them.  Which of the two a
server does was seen to differ from start to start, whatever its KV cache dtype.
"""


REPEATED = (
    "text, fixed lengths",
    "text, chat lengths",
    "lone image request",
    "text, few at a time",
)
LOADS = (*REPEATED, "questions on images")


class Load(NamedTuple):
    """How much is asked for."""

    requests: int = 256
    prompt: int = 512
    outputs: int = 128
    image_requests: int = 16
    tiles: tuple[int, int] = (4, 3)
    images: int = 16
    questions: int = 4
    """On each of the images, in random order."""
    question_letters: int = 48
    answer: int = 32
    concurrency: int = 8
    few: int = 16
    """Text requests at a time where the engine is to be the limit, and not the API server."""
    starts: int = 2
    """Of the servers."""
    repeats: int = 4
    """Of the loads in :data:`REPEATED`, with each start."""
    loads: tuple[str, ...] = LOADS
    """What is asked for at all."""
    start_limit_s: float = 200
    bench_limit_s: float = 60


DRY_LOAD = Load(
    requests=4,
    prompt=40,
    outputs=32,
    image_requests=2,
    tiles=(1, 1),
    images=2,
    questions=3,
    answer=4,
    concurrency=2,
    few=2,
    starts=1,
    repeats=1,
    start_limit_s=400,
    bench_limit_s=120,
)
"""The same on the CPU, where everything but the measuring takes long.

On a busy host all tokens of a short answer come at once.
"""

METRICS = (
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
)
"""Of a server, that :meth:`Server.counts` reads."""
COUNTED = (*METRICS, "cpu_seconds", "page_faults")
ADDED = ("requests", "failed", "cell_s")
"""Numbers of a cell that are sums over its repeats; the others are medians."""
WHICH = ("start", "seed")
"""Numbers of a repeat that say which one it is."""


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of ``vllm serve``; of several the last one counts."""
    given: list[str] = []
    for name, value in settings.items():
        given.append(f"--{name.replace('_', '-')}")
        if value is not True:
            given.append(value if isinstance(value, str) else json.dumps(value))
    return given


class CutOff(TimeoutError):
    """All that was asked takes too long; other than a request to a server that does not answer."""


class Server:
    """``vllm serve`` on a free port, once it is started."""

    def __init__(
        self, directory: Path, arguments: list[str], log: Path, env: dict[str, str]
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.env = log, {**ENVIRONMENT, **env}
        log.unlink(missing_ok=True)
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory)]
        self.command += ["--load-format", "dummy", "--port", str(self.port)]
        self.command += arguments
        self.process: subprocess.Popen[bytes] | None = None

    def get(self, path: str) -> str:
        """Body of an answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return answer.read().decode()

    def start(self, seconds: float) -> None:
        """Start it, and wait until it answers.

        Raises
        ------
        RuntimeError
            If it ends before, or does not answer in time.
        """
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.env,
            )
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start")
            time.sleep(0.3)

    def counts(self) -> dict[str, float]:
        """What has grown since its start, by the names in :data:`COUNTED`.

        CPU seconds and page faults are the API server's, which prepares images.
        """
        assert self.process is not None
        text = self.get("/metrics")
        metrics = {
            name: sum(map(float, re.findall(rf"^vllm:{name}\S* (\S+)$", text, re.M)))
            for name in METRICS
        }
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        values = stat.rpartition(")")[2].split()  # the first is field 3 of proc_pid_stat(5)
        seconds = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
        return {**metrics, "cpu_seconds": seconds, "page_faults": int(values[7])}

    def compiled_late(self) -> str:
        """Kernels that vLLM's log says were compiled while a request waited."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        found = set(re.findall(r"JIT compilation during inference: ([\w.]*\w)", text))
        return ", ".join(sorted(found)) or "none"

    def stop(self) -> None:
        """End it, and whatever it started."""
        if self.process is not None:
            _kill(self.process)
            self.process = None


class Client:
    """``vllm bench serve`` in one process for all loads, whose imports overlap with a server's."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving_http"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                start_new_session=True,
            )

    def run(self, arguments: list[str], result: Path, limit_s: float) -> dict[str, Any]:
        """Result of one run.

        Raises
        ------
        RuntimeError
            If it fails or takes longer than ``limit_s``; then the client has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        arguments = [*arguments, "--ignore-eos", "--disable-tqdm", "--save-result"]
        arguments += ["--save-detailed", "--result-dir", str(result.parent)]
        arguments += ["--result-filename", result.name]
        arguments += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"]
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            self.stop()
            raise RuntimeError(f"vllm bench serve took longer than {limit_s:g} s")
        if self.process.stdout.readline() != DONE or not result.exists():
            self.stop()
            raise RuntimeError("vllm bench serve failed; its log says why")
        return json.loads(result.read_text(encoding="utf-8"))

    def stop(self) -> None:
        """End it."""
        _kill(self.process)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


DONE = "done\n"


def serve_loads() -> None:
    """The client's process: what ``vllm bench serve`` does, for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is for the log
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        main(parser.parse_args(json.loads(line)))
        answers.write(DONE)
        answers.flush()


def letters(draw: random.Random, count: int) -> str:
    """Text of as many tokens: the models of the benchmark have one for each byte."""
    return "".join(draw.choice("abcdefghijklmnop ") for _ in range(count))


def write_chats(path: Path, load: Load) -> None:
    """A file in the format of ShareGPT, with its long-tailed lengths."""
    draw = random.Random(1)

    def text(median: float, most: int) -> str:
        return letters(draw, max(4, min(round(draw.lognormvariate(0, 1) * median), most)))

    turns = [
        {
            "conversations": [
                {"from": "human", "value": text(load.prompt / 4, 1000)},
                {"from": "gpt", "value": text(load.outputs, 1000)},
            ]
        }
        for _ in range(load.requests)
    ]
    path.write_text(json.dumps(turns), encoding="utf-8")


def write_questions(path: Path, model: str, load: Load) -> None:
    """Several questions on each of some images, mixed: all but an image's first can hit."""
    from benchmarks.models import noise_image

    draw = random.Random(2)
    lines = []
    for number in range(load.images):
        file = io.BytesIO()
        noise_image(model, number + 1, load.tiles).save(file, format="PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        for _ in range(load.questions):
            question = {"type": "text", "text": letters(draw, load.question_letters)}
            image = {"type": "image_url", "image_url": {"url": url}}
            lines.append(json.dumps({"content": [image, question]}))
    draw.shuffle(lines)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def loads(directory: Path, model: str, load: Load) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each run."""
    count = ["--num-prompts", str(load.requests)]
    lengths = ["--random-input-len", str(load.prompt), "--random-output-len", str(load.outputs)]
    text = ["--dataset-name", "random", *lengths]
    yield "text, fixed lengths", [*text, *count]
    few = ["--max-concurrency", str(load.few), "--num-prompts", str(load.requests // 2)]
    yield "text, few at a time", [*text, *few]
    dataset = directory / "chats.json"
    write_chats(dataset, load)
    yield (
        "text, chat lengths",
        ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), *count],
    )
    chat = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
    across, down = load.tiles
    image = ["--dataset-name", "random-mm", "--max-concurrency", "1"]
    image += ["--random-mm-base-items-per-request", "1"]
    image += ["--random-mm-bucket-config", f"{{({down * 448}, {across * 448}, 1): 1.0}}"]
    image += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
    image += ["--random-input-len", "16", "--random-output-len", "16"]
    yield "lone image request", [*chat, *image, "--num-prompts", str(load.image_requests)]
    dataset = directory / "questions.jsonl"
    write_questions(dataset, model, load)
    questions = ["--dataset-name", "custom_image", "--dataset-path", str(dataset)]
    questions += ["--disable-shuffle", "--enable-multimodal-chat"]
    questions += ["--custom-output-len", str(load.answer)]
    questions += ["--max-concurrency", str(load.concurrency)]
    questions += ["--num-prompts", str(load.images * load.questions)]
    yield "questions on images", [*chat, *questions]


def thinned(values: Sequence[float], most: int = 256) -> Sequence[float]:
    """So many of them at most, evenly spaced."""
    return values[:: max(1, -(-len(values) // most))]


def _run(
    server: Server, client: Client, options: list[str], seed: int, path: Path, limit_s: float
) -> dict[str, Any]:
    """Figures of one run.

    Another seed is not enough to keep its prompts out of the prefix cache: random ones are pieces
    of one sequence, which is as short as a byte tokenizer's vocabulary, and chats the same in
    another order.  So there is a salt as well.
    """
    begin = time.perf_counter()
    before = server.counts()
    salt = json.dumps({"cache_salt": f"repeat {seed}"})
    result = client.run([*options, "--seed", str(seed), "--extra-body", salt], path, limit_s)
    new = {name: value - before[name] for name, value in server.counts().items()}
    requests = max(result["completed"], 1)
    in_engine = new["request_queue_time_seconds_sum"] + new["request_prefill_time_seconds_sum"]
    return {
        "seed": seed,
        "requests": result["completed"],
        "failed": result["failed"],
        "output_tokens_per_s": round(result["output_throughput"], 1),
        "requests_per_s": round(result["request_throughput"], 3),
        "hit_rate": round(
            new["prefix_cache_hits_total"] / max(new["prefix_cache_queries_total"], 1), 4
        ),
        "first_token_ms_median": round(result["median_ttft_ms"], 2),
        "first_token_ms_p99": round(result["p99_ttft_ms"], 2),
        "engine_first_token_ms_mean": round(1e3 * in_engine / requests, 2),
        "engine_decode_ms_mean": round(1e3 * new["request_decode_time_seconds_sum"] / requests, 2),
        "api_server_cpu_ms_mean": round(1e3 * new["cpu_seconds"] / requests, 2),
        "api_server_page_faults_mean": round(new["page_faults"] / requests, 1),
        "inter_token_ms_median": round(result["median_itl_ms"], 3),
        "inter_token_ms_p99": round(result["p99_itl_ms"], 3),
        "first_token_ms": [round(1e3 * t, 2) for t in result["ttfts"]],
        "inter_token_ms": [
            round(1e3 * t, 2) for t in thinned([t for itl in result["itls"] for t in itl])
        ],
        "cell_s": round(time.perf_counter() - begin, 1),
    }


def combined(what: str, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """The cell of a load: medians over its repeats, and the repeats with their raw samples."""
    cell: dict[str, Any] = {"what": what}
    numbers = (n for n, v in repeats[0].items() if n not in WHICH and not isinstance(v, list))
    for name in numbers:
        values = [repeat[name] for repeat in repeats]
        value = sum(values) if name in ADDED else statistics.median(values)
        cell[name] = round(value, 4)
    return {**cell, "repeats": repeats}


def cells(found: Mapping[tuple[str, str], list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The cell of each load and KV cache dtype."""
    for (what, dtype), repeats in found.items():
        yield {"dtype": dtype, **combined(what, repeats)}


def measure(
    servers: Mapping[str, Server],
    client: Client,
    directory: Path,
    model: str,
    load: Load,
    limit_s: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Cells of servers of some KV cache dtypes.

    Raises
    ------
    CutOff
        If it takes longer than ``limit_s``; cells of what ran before come first.
    RuntimeError, OSError
        If a server does not start or a run fails; likewise.
    """
    prepared = dict(loads(directory, model, load))
    # In turns: what disturbs the host for a while does not hit one load or server alone.
    turns = [(what, repeat) for repeat in range(load.repeats) for what in REPEATED]
    turns += [(what, 0) for what in LOADS if what not in REPEATED]
    turns = [(what, repeat) for what, repeat in turns if what in load.loads]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    end = time.monotonic() + limit_s
    try:
        for start in range(load.starts):
            for dtype, seconds in start_all(servers, load.start_limit_s).items():
                found.setdefault(("start", dtype), []).append({"seconds": seconds})
            for number, (what, repeat) in enumerate(turns):
                seed = start * load.repeats + repeat
                for dtype in [*servers][:: 1 if seed % 2 == 0 else -1]:
                    if time.monotonic() > end:
                        raise CutOff("cut off by --engine-limit")
                    server = servers[dtype]
                    options = ["--port", str(server.port), "--model", str(directory)]
                    options += prepared[what]
                    path = directory / f"bench-{dtype}-{start}-{number}.json"
                    run = _run(server, client, options, seed, path, load.bench_limit_s)
                    found.setdefault((what, dtype), []).append({"start": start, **run})
            for server in servers.values():
                server.stop()
    except (RuntimeError, OSError):
        yield from cells(found)
        raise
    yield from cells(found)
    for dtype, server in servers.items():
        late = server.compiled_late()
        yield {"dtype": dtype, "what": "compiled while serving", "kernels": late}


def start_all(servers: Mapping[str, Server], limit_s: float) -> dict[str, float]:
    """Start servers at once; how many seconds each took.

    Raises
    ------
    RuntimeError
        If one does not start.
    """

    def seconds(server: Server) -> float:
        begin = time.perf_counter()
        server.start(limit_s)
        return round(time.perf_counter() - begin, 1)

    with ThreadPoolExecutor() as pool:
        return dict(zip(servers, pool.map(seconds, servers.values()), strict=True))


if __name__ == "__main__":
    serve_loads()
