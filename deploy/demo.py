"""One picture, one question, two servers: vLLM as it is, and with visual tokens at 1 bit.

``make demo`` runs this.  Both servers are real ``vllm serve`` processes that serve the tiny model
of ``tests/tinyvlm`` and are asked through the official OpenAI client.
"""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.tinyvlm.dataset import Example, examples
from tests.tinyvlm.generator import TASKS
from tests.tinyvlm.unpack import CACHE, model_path

OUT = CACHE / "demo"
DTYPE = "calibquant1"
MODEL = "tinyvlm"
PAGE_TOKENS = 16  # of text in one of our pages
STOCK_BLOCK = 32  # tokens; vLLM's default on the CPU, 128, is too coarse to compare single requests
MAX_REPEATS = 50
START_TIMEOUT = 400  # seconds; 40 on two idle cores
VISUAL_TOKENS = 576  # of a picture
SEED = 7  # of the pictures; they are of the test split, which the model was never trained on

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def styled(text: object, code: str) -> str:
    """Return the text in an ANSI style, where the terminal shows it."""
    return f"\x1b[{code}m{text}\x1b[0m" if COLOUR else str(text)


def bold(text: object) -> str:
    """Return the text in bold."""
    return styled(text, "1")


def dim(text: object) -> str:
    """Return the text in grey."""
    return styled(text, "2")


def kib(num_bytes: float) -> str:
    """Return a size as text."""
    return f"{num_bytes / 1024:.0f} KiB"


@dataclass
class Metrics:
    """The largest value that each gauge of a server had while a request ran."""

    peak: dict[str, float] = field(default_factory=dict)

    def see(self, page: str) -> None:
        """Take in one reading of ``/metrics``."""
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                kind = sample.labels.get("format")
                name = sample.name + (f":{kind}" if kind else "")
                self.peak[name] = max(sample.value, self.peak.get(name, 0.0))
                if sample.name == "vllm:cache_config_info":
                    self.peak["num_blocks"] = float(sample.labels["num_gpu_blocks"])

    def __getitem__(self, name: str) -> float:
        return self.peak[name]

    @property
    def pages(self) -> float:
        """Pages of the KV pool in use; the null page that vLLM keeps for itself does not count."""
        return self["vllm:kv_cache_usage_perc"] * (self["num_blocks"] - 1)


class Server:
    """A ``vllm serve`` process in a session of its own, so that all its children stop with it."""

    def __init__(self, name: str, *flags: str) -> None:
        self.name = name
        self.log = OUT / f"server-{name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(model_path()),
            *flags,
            "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--max-model-len", "1024",
            "--enforce-eager",  # compiling for a minute would not pay for a few requests
        ]  # fmt: skip
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both servers sit on the same cores
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        """GET a path."""
        with urllib.request.urlopen(self.url + path, timeout=5) as reply:
            return reply.read().decode()

    def is_ready(self) -> bool:
        """Whether ``/health`` answers.

        Raises
        ------
        RuntimeError
            If the process has ended.
        """
        if self.process.poll() is not None:
            tail = "".join(self.log.open().readlines()[-15:])
            raise RuntimeError(
                f"the {self.name} server ended with status {self.process.returncode}; "
                f"its log ({self.log}) closes with\n{tail}"
            )
        with contextlib.suppress(OSError):
            self.get("/health")
            return True
        return False

    @contextlib.contextmanager
    def watched(self) -> Iterator[Metrics]:
        """Read ``/metrics`` all the while: the gauges fall back when a request ends."""
        metrics, stop = Metrics(), threading.Event()

        def poll() -> None:
            while not stop.is_set():
                metrics.see(self.get("/metrics"))
                stop.wait(0.005)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield metrics
        finally:
            stop.set()
            thread.join()

    def ask(self, example: Example) -> str:
        """Ask one question about one picture."""
        png = io.BytesIO()
        example.image.save(png, "PNG")
        data = base64.b64encode(png.getvalue()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        question = {"type": "text", "text": example.question}
        with OpenAI(base_url=f"{self.url}/v1", api_key="none") as client:
            reply = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": [picture, question]}],
                temperature=0.0,
                max_tokens=24,
            )
        return reply.choices[0].message.content or ""

    def measure(self, example: Example, gauge: str) -> tuple[str, Metrics]:
        """Ask a question and see the gauges while it is answered.

        An answer takes a fraction of a second: where no reading fell into it, ask again for the
        gauges' sake.
        """
        with self.watched() as metrics:
            answer = self.ask(example)
            for _ in range(MAX_REPEATS):
                if metrics.peak.get(gauge):
                    return answer, metrics
                self.ask(example)
        raise RuntimeError(f"{gauge} of the {self.name} server stayed at 0")

    def interrupt(self) -> None:
        """Ask the server to shut down."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Wait for the server to shut down, and kill what is left of it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(**flags: tuple[str, ...]) -> Iterator[list[Server]]:
    """Start servers side by side, wait until all are ready, and stop them whatever happens."""
    servers: list[Server] = []
    begin = time.monotonic()
    try:
        for name, options in flags.items():
            servers.append(Server(name, *options))
            print(f"  vllm serve tinyvlm {' '.join(options)}")
        waiting = list(servers)
        while waiting:
            seconds = time.monotonic() - begin
            if seconds > START_TIMEOUT:
                names = " and ".join(server.name for server in waiting)
                raise RuntimeError(f"{names} not ready after {START_TIMEOUT} s; logs are in {OUT}")
            if sys.stdout.isatty():
                print(f"\r  starting … {seconds:.0f} s ", end="", flush=True)
            waiting = [server for server in waiting if not server.is_ready()]
            time.sleep(0.25)
        print(f"{chr(13) if sys.stdout.isatty() else ''}  both ready after {seconds:.0f} s")
        yield servers
    finally:
        for server in servers:
            server.interrupt()
        for server in servers:
            server.stop()
        print("  both servers stopped")


def kv_bytes_per_token() -> int:
    """Bytes of KV cache for one token of the tiny model at 16 bits."""
    config = json.loads((model_path() / "config.json").read_text())["text_config"]
    return (
        2 * 2 * (config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])
    )


def verdict(answer: str, truth: str) -> str:
    """Return an answer, marked as right or wrong."""
    mark = styled("✓", "32") if answer == truth else styled("✗", "31")
    return f"{mark} {answer}"


def table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns; the first is the head."""
    plain = [[strip_style(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in plain) for i in range(len(rows[0]))]
    for row, bare in zip(rows, plain, strict=True):
        cells = (
            cell + " " * (width - len(text))
            for cell, text, width in zip(row, bare, widths, strict=True)
        )
        line = "  " + "   ".join(cells).rstrip()
        print(dim(line) if row is rows[0] else line)


def strip_style(text: str) -> str:
    """Return the text without ANSI styles."""
    for code in ("1", "2", "31", "32", "0"):
        text = text.replace(f"\x1b[{code}m", "")
    return text


def main() -> None:
    """Run the demo."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run the `finally` clauses
    begin = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    pictures = list(examples("test", SEED, 1, TASKS))
    main_example = pictures[0]
    for example in pictures:
        example.image.save(OUT / f"{example.task}.png")

    print(bold("\n1-bit visual KV cache, beside vLLM as it is\n"))
    print(f"  picture   {os.path.relpath(OUT / 'field.png')}")
    print(f"  question  {main_example.question}\n")
    with running(
        stock=("--kv-cache-dtype", "auto", "--block-size", str(STOCK_BLOCK)),
        calibquant=("--kv-cache-dtype", DTYPE),
    ) as (stock, ours):
        stock_answer, at_16 = stock.measure(main_example, "vllm:kv_cache_usage_perc")
        our_answer, at_1 = ours.measure(main_example, "vllm:calibquant_visual_tokens")
        others = [(row, stock.ask(row), ours.ask(row)) for row in pictures[1:]]

    page = PAGE_TOKENS * kv_bytes_per_token()
    tokens = at_1["vllm:calibquant_visual_tokens"]
    codes = at_1["vllm:calibquant_pages:visual"] * page
    exact = tokens * kv_bytes_per_token()
    whole_at_16 = at_16.pages * STOCK_BLOCK * kv_bytes_per_token()
    whole = page * (at_1["vllm:calibquant_pages:visual"] + at_1["vllm:calibquant_pages:text"])
    print()
    table(
        [
            ("", "16 bits", "1 bit", ""),
            ("answer", bold(stock_answer), bold(our_answer), f"true: {main_example.answer}"),
            (
                f"KV cache of {tokens:.0f} visual tokens in codes",
                kib(exact),
                bold(kib(codes)),
                bold(f"{exact / codes:.1f}× smaller"),
            ),
            (
                "KV cache of the whole request",
                kib(whole_at_16),
                kib(whole),
                f"{whole_at_16 / whole:.1f}× smaller",
            ),
        ]
    )
    print(
        dim(
            f"\n  Of {VISUAL_TOKENS} visual tokens in the picture, those that share a block with"
            "\n  text or would fill just one block of a page stay at 16 bits: the larger the"
            "\n  picture, the nearer a whole request comes to 14×."
        )
    )
    print("\n  More pictures of the same test split, one for each kind of question:\n")
    table(
        [
            ("picture", "question", "true", "16 bits", "1 bit"),
            *(
                (
                    os.path.relpath(OUT / f"{row.task}.png"),
                    row.question,
                    row.answer,
                    verdict(at_16_bits, row.answer),
                    verdict(at_1_bit, row.answer),
                )
                for row, at_16_bits, at_1_bit in others
            ),
        ]
    )
    print(dim(f"\n  {time.monotonic() - begin:.0f} s in all; server logs are in {OUT}\n"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(f"\n{error}")
