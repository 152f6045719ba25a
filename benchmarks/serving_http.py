"""The scenario ``http`` of :mod:`benchmarks.serving`: ``vllm serve`` and ``vllm bench serve``.

What must not become worse, through everything that a user has in between: HTTP server, tokenizer,
image processor.  Engine settings are vLLM's defaults, torch.compile and all CUDA graphs included.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class Load(NamedTuple):
    """How much is asked for."""

    requests: int = 256
    prompt: int = 512
    outputs: int = 128
    image_requests: int = 8
    tiles: tuple[int, int] = (4, 3)
    start_limit_s: float = 200
    bench_limit_s: float = 120


DRY_LOAD = Load(requests=4, prompt=40, outputs=8, image_requests=2, tiles=(1, 1))


class Server:
    """``vllm serve`` on a free port."""

    def __init__(self, directory: Path, dtype: str, arguments: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [*VLLM, "serve", str(directory), "--load-format", "dummy", "--port"]
        command += [str(self.port), "--kv-cache-dtype", dtype, *arguments]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, seconds: float) -> None:
        """Until it answers.

        Raises
        ------
        RuntimeError
            If it ends before, or does not answer in time.
        """
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start")
            time.sleep(0.3)

    def stop(self) -> None:
        """End it, and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def chats(path: Path, load: Load) -> None:
    """A file in the format of ShareGPT, with its long-tailed lengths, of one token a letter."""
    draw = random.Random(1)

    def text(median: float, most: int) -> str:
        length = max(4, min(round(draw.lognormvariate(0, 1) * median), most))
        return "".join(draw.choice("abcdefghijklmnop ") for _ in range(length))

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


def bench(server: Server, directory: Path, arguments: list[str], load: Load) -> dict[str, Any]:
    """Run ``vllm bench serve``; returns its result."""
    result = directory / "bench.json"
    result.unlink(missing_ok=True)
    command = [*VLLM, "bench", "serve", "--port", str(server.port), "--model", str(directory)]
    command += ["--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]
    command += ["--result-dir", str(directory), "--result-filename", result.name]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=load.bench_limit_s,
        check=False,
    )
    if done.returncode or not result.exists():
        raise RuntimeError(f"vllm bench serve: {(done.stderr or done.stdout)[-400:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def loads(directory: Path, load: Load) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each run."""
    count = ["--num-prompts", str(load.requests)]
    lengths = ["--random-input-len", str(load.prompt), "--random-output-len", str(load.outputs)]
    yield "text, fixed lengths", ["--dataset-name", "random", *lengths, *count]
    dataset = directory / "chats.json"
    chats(dataset, load)
    yield (
        "text, chat lengths",
        ["--dataset-name", "sharegpt", "--dataset-path", str(dataset), *count],
    )
    across, down = load.tiles
    bucket = f"{{({down * 448}, {across * 448}, 1): 1.0}}"
    image = ["--dataset-name", "random-mm", "--backend", "openai-chat"]
    image += ["--endpoint", "/v1/chat/completions", "--max-concurrency", "1", "--num-warmups", "2"]
    image += ["--random-mm-base-items-per-request", "1", "--random-mm-bucket-config", bucket]
    image += ["--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}']
    image += ["--random-input-len", "16", "--random-output-len", "16"]
    yield "lone image request", [*image, "--num-prompts", str(load.image_requests)]


def measure(
    directory: Path, dtype: str, arguments: list[str], load: Load, log: Path
) -> Iterator[dict[str, Any]]:
    """Cells of one KV cache dtype."""
    begin = time.perf_counter()
    server = Server(directory, dtype, arguments, log)
    try:
        server.wait(load.start_limit_s)
        yield {"what": "start", "seconds": round(time.perf_counter() - begin, 1)}
        for what, options in loads(directory, load):
            begin = time.perf_counter()
            try:
                result = bench(server, directory, options, load)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                yield {"what": what, "error": str(error)[-500:]}
                continue
            yield {
                "what": what,
                "requests": result["completed"],
                "output_tokens_per_s": round(result["output_throughput"], 1),
                "first_token_ms_median": round(result["median_ttft_ms"], 2),
                "first_token_ms_p99": round(result["p99_ttft_ms"], 2),
                "inter_token_ms_median": round(result["median_itl_ms"], 3),
                "inter_token_ms_p99": round(result["p99_itl_ms"], 3),
                "first_token_ms": [round(1e3 * t, 2) for t in result["ttfts"]],
                "cell_s": round(time.perf_counter() - begin, 1),
            }
    finally:
        server.stop()
