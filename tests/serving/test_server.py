"""A real ``vllm serve`` with few pages, asked through the official client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image

# As a user's shell has it: engines that other tests run in this process leave variables behind.
ENVIRONMENT = dict(os.environ)
NAME = "tiny"
PAGES = 72
"""Room for one prompt of the longest kind, or for half of what the flood has in flight."""
IN_FLIGHT = 16
SLOTS = 3
"""Blocks of a visual page at 4 bits, in bfloat16."""
PAGE_BYTES = 6 * 16 * 2 * (64 + 64) * 2
"""Of a text page: 6 layers, 16 tokens, 2 KV heads, K and V of 64 channels in bfloat16."""
GAUGES = ("vllm:calibquant_pages", "vllm:calibquant_visual_tokens", "vllm:calibquant_bytes_saved")


class Server:
    """The subprocess, its log and its metrics."""

    def __init__(self, model: Path, log: Path, kv_cache_dtype: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command: list[str | Path] = [
            Path(sys.executable).parent / "vllm",
            *("serve", model, "--served-model-name", NAME, "--port", str(self.port)),
            *("--kv-cache-dtype", kv_cache_dtype, "--num-gpu-blocks-override", str(PAGES)),
            *("--kv-cache-memory-bytes", str(32 << 20), "--max-model-len", "2048"),
            *("--max-num-seqs", str(IN_FLIGHT), "--enforce-eager"),
            *("--limit-mm-per-prompt", '{"image": 2}'),
        ]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                env=ENVIRONMENT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0
        )

    def wait(self, seconds: float) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no server:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.5)

    def get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """Sum of each metric, and of each format's pages."""
        sums: dict[str, float] = {}
        for name, labels, value in re.findall(
            r"^(vllm:\w+)\{(.*)\} (\S+)$", self.get("/metrics"), re.MULTILINE
        ):
            sums[name] = sums.get(name, 0.0) + float(value)
            if kind := re.search(r'format="(\w+)"', labels):
                sums[f"{name}:{kind[1]}"] = float(value)
        return sums

    def idle(self) -> dict[str, float]:
        """Metrics once nothing runs, which the last step publishes a moment later."""
        end = time.monotonic() + 30
        while True:
            metrics = self.metrics()
            if time.monotonic() > end or not (
                metrics["vllm:num_requests_running"] or metrics["vllm:kv_cache_usage_perc"]
            ):
                return metrics
            time.sleep(0.1)

    def stop(self) -> int:
        """Ask it to end, and see that nothing of it is left."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Server]:
    running = Server(model, tmp_path_factory.mktemp("server") / "log", "calibquant4")
    try:
        running.wait(240)
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def data_url(image: Image.Image) -> str:
    with io.BytesIO() as file:
        image.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(text: str, *urls: str) -> list[dict]:
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(server: Server, text: str, *urls: str, **settings) -> str:
    done = server.client.chat.completions.create(
        model=NAME,
        messages=message(text, *urls),
        **{"temperature": 0, "max_tokens": 20, **settings},
    )
    return done.choices[0].message.content


def assert_free(metrics: dict[str, float]) -> None:
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    assert metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0
    for name in (*GAUGES, "vllm:calibquant_pages:text", "vllm:calibquant_pages:visual"):
        assert metrics[name] == 0


def test_start(server: Server) -> None:
    # The engine, another process, writes its log when it gets to it: late on a busy machine.
    end = time.monotonic() + 60
    while " KV pages (" not in (log := server.log.read_text()) and time.monotonic() < end:
        time.sleep(0.5)
    lines = [line for line in log.splitlines() if " KV pages (" in line]
    assert len(lines) == 1, log
    assert f"calibquant4: {PAGES - 1} KV pages (" in lines[0]
    assert f"{(PAGES - 1) * 16 * SLOTS:,} visual tokens in codes ({SLOTS}x)" in lines[0]
    text = server.get("/metrics")
    for name in GAUGES:
        assert re.search(rf"^# HELP {name} \S.*\.$", text, re.MULTILINE)
        assert f"# TYPE {name} gauge" in text
    assert_free(server.metrics())


def test_images_and_text_at_once(server: Server, questions) -> None:
    """Right answers: the model reads these with 16-bit pages, and 4 bits lose nothing of it."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.client.base_url, api_key="none") as client:

            async def one(text: str, *urls: str) -> str:
                done = await client.chat.completions.create(
                    model=NAME, messages=message(text, *urls), temperature=0, max_tokens=20
                )
                return done.choices[0].message.content

            texts = [one("How many red circles? " * n) for n in (1, 10, 20)]
            return await asyncio.gather(
                *(one(q.question, data_url(q.image)) for q in questions), *texts
            )

    answers = asyncio.run(run())
    assert answers[: len(questions)] == [q.answer for q in questions]
    assert_free(server.idle())


def test_streaming(server: Server, questions) -> None:
    question = questions[0]
    stream = server.client.chat.completions.create(
        model=NAME,
        messages=message(question.question, data_url(question.image)),
        temperature=0,
        max_tokens=20,
        stream=True,
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len([part for part in parts if part]) > 2
    assert "".join(parts) == question.answer


def test_client_goes_away(server: Server, questions) -> None:
    """In mid-stream; the metrics of the running request are there until it does."""
    question = questions[2]
    before = server.metrics()
    with server.client.chat.completions.create(
        model=NAME,
        messages=message(question.question, data_url(question.image)),
        temperature=0,
        max_tokens=700,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        for number, _ in enumerate(stream):
            if number == 5:
                break
        end = time.monotonic() + 20
        while not (busy := server.metrics())["vllm:calibquant_visual_tokens"]:
            assert time.monotonic() < end
        # An image after one token of text: its blocks 1 to 35 are visual, and fill 12 pages.
        assert busy["vllm:calibquant_visual_tokens"] == 35 * 16
        assert busy["vllm:calibquant_pages:visual"] == -(-35 // SLOTS)
        assert busy["vllm:calibquant_pages:text"] >= 2
        assert busy["vllm:calibquant_bytes_saved"] == (35 - -(-35 // SLOTS)) * PAGE_BYTES
        assert busy["vllm:kv_cache_usage_perc"] > 0
    after = server.idle()
    assert_free(after)
    generated = "vllm:generation_tokens_total"
    assert after[generated] - before[generated] < 700


def test_second_turn_hits_the_image(server: Server, questions) -> None:
    question = questions[4]
    url = data_url(question.image)
    ask(server, "Read line 1.", url)
    before = server.idle()
    assert ask(server, question.question, url) == question.answer
    after = server.idle()
    hits = "vllm:prefix_cache_hits_total"
    assert after[hits] - before[hits] == 576


def test_two_images(server: Server, questions) -> None:
    urls = [data_url(questions[i].image) for i in (0, 2)]
    assert ask(server, "What is the serial?", *urls)
    assert_free(server.idle())


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("What is this?", ["data:image/png;base64,AAAA"]),
        ("What is this?", ["data:image/png;base64,not base64"]),
        ("one two three " * 1000, []),
        ("Too many.", ["image"] * 3),
    ],
    ids=["broken image", "broken text of an image", "long prompt", "third image"],
)
def test_bad_request_is_the_clients_fault(server: Server, questions, text: str, urls) -> None:
    urls = [data_url(questions[0].image) if url == "image" else url for url in urls]
    with pytest.raises(openai.BadRequestError):
        ask(server, text, *urls)
    assert ask(server, questions[0].question, data_url(questions[0].image)) == questions[0].answer
    assert_free(server.idle())


def test_text_longer_than_the_pool(server: Server, questions) -> None:
    """As long as the model takes, which an image may be; no page is ever taken for it."""
    with pytest.raises(openai.BadRequestError, match=r"pages of the KV cache, which has 71"):
        ask(server, "one two three " * 150, max_tokens=1)
    assert ask(server, questions[0].question, data_url(questions[0].image)) == questions[0].answer
    assert_free(server.idle())


def test_more_requests_than_fit(server: Server, questions) -> None:
    """Some are preempted, some go away, and nothing is left behind."""
    urls = [data_url(q.image) for q in questions]
    before, seen = server.metrics(), []

    async def run() -> list[bool]:
        slots = asyncio.Semaphore(IN_FLIGHT)
        client = openai.AsyncOpenAI(base_url=server.client.base_url, api_key="none", timeout=300)

        async def one(i: int) -> bool:
            question, url = questions[i % len(questions)], urls[i % len(questions)]
            kind = i % 5
            async with slots:
                stream = await client.chat.completions.create(
                    model=NAME,
                    messages=message(question.question, url)
                    if kind < 3
                    else message("How many red circles? " * (i % 20 + 1)),
                    temperature=0,
                    # One in five of the images talks on past its answer, until pages run out.
                    max_tokens=160 if kind == 0 else 16,
                    stream=True,
                    extra_body={"ignore_eos": kind == 0},
                )
                text = ""
                async with stream:
                    async for chunk in stream:
                        text += chunk.choices[0].delta.content or ""
                        if i % 17 == 0 and text:
                            return True  # goes away
            return kind >= 3 or text.startswith(question.answer)

        async def watch() -> None:
            while True:
                seen.append(await asyncio.to_thread(server.metrics))
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        async with client:
            right = await asyncio.gather(*(one(i) for i in range(80)))
        watching.cancel()
        return right

    right = asyncio.run(run())
    assert all(right)
    after = server.idle()
    assert_free(after)
    assert after["vllm:num_preemptions_total"] > before["vllm:num_preemptions_total"]
    assert max(m["vllm:calibquant_visual_tokens"] for m in seen) > 15 * 16
    assert max(m["vllm:kv_cache_usage_perc"] for m in seen) > 0.5
    for metrics in seen:
        pages = metrics["vllm:calibquant_pages"]
        assert pages <= PAGES - 1


def test_clean_exit(server: Server) -> None:
    """The last test: no line of the log is a traceback, and SIGTERM ends the server.

    vLLM's own lines of statistics are there, and say nothing of what carries our counts.
    """
    # Looked at before: on SIGTERM vLLM's engine may be gone before its API server is told to stop,
    # which then logs that the engine died.
    log = server.log.read_text()
    assert "Traceback" not in log
    assert "KV cache usage: " in log and "KV fetch: " not in log
    assert server.stop() == 0
    assert "Application shutdown complete" in server.log.read_text()
