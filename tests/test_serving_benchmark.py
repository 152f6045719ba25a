"""The serving benchmark on the CPU, and what is made of its records."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import pytest

from benchmarks import report, serving, serving_http, serving_summary
from benchmarks.models import cache_settings, make_model
from benchmarks.records import commit, record_path, save_record
from benchmarks.serving_scenarios import DRY_RUN, Plan
from benchmarks.serving_summary import (
    ROWS,
    Goal,
    at_least,
    at_most,
    crossings,
    load_runs,
    ratio,
    summary_lines,
)
from vllm_calibquant.config import load_config
from vllm_calibquant.profile import load_profile

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    """All scenarios on one small engine and behind one server, as the GPU runs them."""
    folder = tmp_path_factory.mktemp("serving")
    command = [sys.executable, "-m", "benchmarks.serving", "--dry-run", "--dtypes", "calibquant1"]
    done = subprocess.run(
        [*command, "--out", folder, "--log-dir", folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("serving-*.json")
    return path


def test_runs_of_one_second_have_records_of_their_own(tmp_path):
    date = "2026-01-01T23:59:59+00:00"
    first, second = (record_path("serving", date, tmp_path) for _ in range(2))
    save_record(first, {"cells": []})
    third = record_path("serving", date, tmp_path)
    assert first.name == "serving-20260101T235959.json"
    assert [second.name, third.name] == [f"serving-20260102T00000{n}.json" for n in range(2)]
    assert list(tmp_path.glob("*.json")) == [first]


def test_every_scenario_runs(record: Path):
    content = json.loads(record.read_text())
    assert [e["event"] for e in content["engines"]] == ["start"]
    cells = content["cells"]
    assert not [c for c in cells if "error" in c]
    assert {c["scenario"] for c in cells} == set(serving.SCENARIOS)
    for cell in cells:
        assert serving_summary.measured(cell), cell
    for cell in (c for c in cells if c["scenario"] in ("resident", "decode", "mix")):
        assert cell["most_running"] == cell["requests"] > 0
        assert len(cell["step_ms"]) >= cell["outputs"] - 3
        # All but the last tokens of a prompt were planted.
        assert cell["planted_share"] * cell["prompt_tokens"] >= cell["prompt_tokens"] - 17
    chats = next(c for c in cells if c["scenario"] == "image-chats")
    assert chats["turns"] == chats["users"] * (chats["turns_a_user"] - 1)
    assert chats["images_a_user"] == 2
    assert 0.8 < chats["hit_rate"] < 1


def test_a_server_answers_all_that_is_asked_over_http(record: Path):
    """``vllm serve`` with codes under ``vllm bench serve``, both as they are."""
    content = json.loads(record.read_text())
    cells = {c["what"]: c for c in content["cells"] if c["scenario"] == "http"}
    load = serving_http.DRY_LOAD
    asked = {
        "text, fixed lengths": load.requests,
        "text, chat lengths": load.requests,
        "lone image request": load.image_requests,
        "text, few at a time": load.requests // 2,
        "questions on images": load.images * load.questions,
    }
    assert list(cells) == ["start", *asked, "compiled while serving"]
    for what, requests in asked.items():
        cell = cells[what]
        assert (cell["requests"], cell["failed"]) == (requests, 0)
        (once,) = cell["repeats"]
        assert len(once["first_token_ms"]) == requests
        assert 0 < len(once["inter_token_ms"]) <= 256
        assert once["api_server_cpu_ms_mean"] > 0
        assert once["api_server_page_faults_mean"] >= 0
    assert cells["questions on images"]["hit_rate"] > 0.3
    assert cells["compiled while serving"]["kernels"] == "none"


class FakeServer:
    """Answers at once; half of the prompt tokens of each run hit."""

    def __init__(self, port: int = 1) -> None:
        self.port, self.looked, self.starts, self.up = port, 0, 0, False

    def start(self, seconds: float) -> None:
        """It has started, once more."""
        assert not self.up
        self.starts, self.up = self.starts + 1, True

    def stop(self) -> None:
        """It has ended."""
        self.up = False

    def counts(self) -> dict[str, float]:
        """Asked before and after each run, of four requests."""
        assert self.up
        self.looked += 1
        growth = zip(serving_http.COUNTED, (50, 100, 0.004, 0.08, 1.2, 0.2, 40), strict=True)
        return {name: by * self.looked for name, by in growth}

    def compiled_late(self) -> str:
        """Nothing."""
        return "none"


class FakeClient:
    """Runs whose figures are given; text of fixed lengths is the first load of each turn."""

    def __init__(self, rates: list[float], fails_at: int | None = None) -> None:
        self.rates, self.fails_at = rates, fails_at
        self.ran: list[dict[str, str]] = []

    def run(self, arguments: list[str], result: Path, limit_s: float) -> dict:
        """The next of them."""
        number = len(self.ran)
        if number == self.fails_at:
            raise RuntimeError("it took longer")
        pairs = zip(arguments, [*arguments[1:], ""], strict=True)
        self.ran.append({"file": result.name} | {k: v for k, v in pairs if k.startswith("--")})
        rate = self.rates[number]
        figures = dict.fromkeys(("median_ttft_ms", "p99_ttft_ms", "median_itl_ms"), rate / 10)
        figures |= {"request_throughput": rate / 100, "output_throughput": rate}
        times = {"ttfts": [rate / 1e3], "itls": [[rate / 1e3, 0.5], []]}
        return {"completed": 4, "failed": 1, "p99_itl_ms": 1.0, **figures, **times}


def test_loads_are_repeated_in_turns_and_medians_count(tmp_path: Path):
    """Not the first, the last, the best or the mean; prompts that no repeat before has had."""
    rates = [900.0, 10.0, 7.0, 50.0, 100.0, 30.0, 5.0, 70.0, 200.0, 80.0, 6.0, 20.0, 55.0]
    client = FakeClient(rates)
    load = serving_http.DRY_LOAD._replace(repeats=3)
    model = serving.DRY_MODEL
    cells = [*serving_http.measure({"auto": FakeServer()}, client, tmp_path, model, load)]
    assert {cell.pop("dtype") for cell in cells} == {"auto"}
    turn = ["random", "sharegpt", "random-mm", "random"]
    assert [run["--dataset-name"] for run in client.ran] == [*turn * 3, "custom_image"]
    assert [run["--seed"] for run in client.ran] == [*"000011112222", "0"]
    salts = [json.loads(run["--extra-body"])["cache_salt"] for run in client.ran]
    assert salts[0:12:4] == salts[1:12:4] == salts[2:12:4] == salts[3:12:4]
    assert len(set(salts)) == 3
    assert len({run["file"] for run in client.ran}) == len(rates)
    what = ["start", *serving_http.REPEATED, "questions on images", "compiled while serving"]
    assert [cell["what"] for cell in cells] == what
    assert cells[1]["engine_first_token_ms_mean"] == 21
    assert cells[1]["engine_decode_ms_mean"] == 300
    assert cells[1]["api_server_cpu_ms_mean"] == 50
    assert cells[1]["api_server_page_faults_mean"] == 10
    for cell, own in zip(cells[1:6], (*(rates[i:12:4] for i in range(4)), [55]), strict=True):
        assert [repeat["output_tokens_per_s"] for repeat in cell["repeats"]] == own
        assert [repeat["first_token_ms"] for repeat in cell["repeats"]] == [[r] for r in own]
        assert [repeat["inter_token_ms"] for repeat in cell["repeats"]] == [[r, 500] for r in own]
        assert [repeat["seed"] for repeat in cell["repeats"]] == [*range(len(own))]
        assert cell["output_tokens_per_s"] == sorted(own)[len(own) // 2]
        assert cell["first_token_ms_median"] == cell["output_tokens_per_s"] / 10
        assert cell["hit_rate"] == 0.5
        assert (cell["requests"], cell["failed"]) == (4 * len(own), len(own))
    for plan, asked in ((Plan(), serving_http.Load()), (DRY_RUN, serving_http.DRY_LOAD)):
        assert (plan.http_starts, plan.http_repeats) == (asked.starts, asked.repeats)
    assert (Plan().http_starts, DRY_RUN.http_starts) == (2, 1)


def test_servers_start_several_times_and_medians_are_over_all_starts(tmp_path: Path):
    rates = [float(rate) for rate in range(1, 19)]
    client = FakeClient(rates)
    server = FakeServer()
    load = serving_http.DRY_LOAD._replace(starts=2, repeats=2)
    cells = [*serving_http.measure({"auto": server}, client, tmp_path, serving.DRY_MODEL, load)]
    assert server.starts == 2 and not server.up
    found = {cell["what"]: cell for cell in cells}
    assert len(found["start"]["repeats"]) == 2
    repeats = found["text, fixed lengths"]["repeats"]
    assert [r["output_tokens_per_s"] for r in repeats] == [1, 5, 10, 14]
    assert [(r["start"], r["seed"]) for r in repeats] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert found["text, fixed lengths"]["output_tokens_per_s"] == 7.5
    assert [r["seed"] for r in found["questions on images"]["repeats"]] == [0, 2]


def test_only_some_loads_are_asked_for(tmp_path: Path):
    client, model = FakeClient([1.0, 2.0, 3.0, 4.0]), serving.DRY_MODEL
    some = ("text, few at a time", "text, fixed lengths")
    load = serving_http.DRY_LOAD._replace(repeats=2, loads=some)
    cells = [*serving_http.measure({"auto": FakeServer()}, client, tmp_path, model, load)]
    assert ["--max-concurrency" in run for run in client.ran] == [False, True] * 2
    what = ["start", "text, fixed lengths", "text, few at a time", "compiled while serving"]
    assert [cell["what"] for cell in cells] == what


def test_a_run_over_its_limit_keeps_what_it_had(tmp_path: Path, monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(serving_http.time, "monotonic", lambda: next(seconds))
    client, model = FakeClient([300.0, 10.0, 7.0, 100.0]), serving.DRY_MODEL
    servers, load = {"auto": FakeServer()}, serving_http.DRY_LOAD
    measured = serving_http.measure(servers, client, tmp_path, model, load, limit_s=2)
    cells = [next(measured) for _ in range(3)]
    assert [cell["what"] for cell in cells] == ["start", *serving_http.REPEATED[:2]]
    with pytest.raises(serving_http.CutOff, match="--engine-limit"):
        next(measured)


def test_two_servers_are_asked_the_same_in_turns(tmp_path: Path):
    """Neither is always the first: what changes with time is the same for both."""
    rates = [float(rate) for rate in range(1, 19)]
    client = FakeClient(rates)
    servers = {"auto": FakeServer(1), "calibquant1": FakeServer(2)}
    load = serving_http.DRY_LOAD._replace(repeats=2)
    cells = [*serving_http.measure(servers, client, tmp_path, serving.DRY_MODEL, load)]
    assert "".join(run["--port"] for run in client.ran) == "12" * 4 + "21" * 4 + "12"
    for one, two in zip(client.ran[::2], client.ran[1::2], strict=True):
        assert {**one, "--port": 0, "file": 0} == {**two, "--port": 0, "file": 0}
    assert len({run["file"] for run in client.ran}) == len(rates)
    found = {(cell["dtype"], cell["what"]): cell for cell in cells}
    assert len(found) == len(cells) == 2 * 7
    for dtype, own in (("auto", (1, 10)), ("calibquant1", (2, 9))):
        repeats = found[dtype, "text, fixed lengths"]["repeats"]
        assert [repeat["output_tokens_per_s"] for repeat in repeats] == [*own]


def test_settings_reach_servers_too():
    settings = {"max_model_len": 4096, "dtype": "half", "enforce_eager": True, "hf_overrides": {}}
    options = ["--max-model-len", "4096", "--dtype", "half", "--enforce-eager"]
    assert serving_http.as_options(settings) == [*options, "--hf-overrides", "{}"]


def test_servers_are_paired_with_the_first_dtype():
    def dtypes(names: list[str]) -> list[list[str]]:
        return [job["dtypes"] for job in serving.jobs(options(dtypes=names, scenarios=["http"]))]

    def options(**given) -> argparse.Namespace:
        none = dict.fromkeys(("pool_gb", "log_dir", "engine_limit", "limit"))
        return argparse.Namespace(
            models=["m"], settings={}, plan={}, dry_run=False, **none, **given
        )

    assert dtypes(["auto"]) == [["auto"]]
    assert dtypes(["auto", "fp8", "calibquant1"]) == [["auto", "fp8"], ["auto", "calibquant1"]]
    every = serving.jobs(options(dtypes=["auto", "fp8"], scenarios=["http", "decode"]))
    assert [job["scenarios"] for job in every] == [["decode"], ["decode"], ["http"]]


def test_a_run_that_fails_does_not_lose_those_before_it(tmp_path: Path):
    client = FakeClient([300.0, 10.0, 7.0, 50.0, 100.0], fails_at=5)
    load = serving_http.DRY_LOAD._replace(repeats=3)
    servers = {"auto": FakeServer()}
    measured = serving_http.measure(servers, client, tmp_path, serving.DRY_MODEL, load)
    cells = [next(measured) for _ in range(5)]
    with pytest.raises(RuntimeError, match="it took longer"):
        next(measured)
    assert [len(cell["repeats"]) for cell in cells] == [1, 2, 1, 1, 1]
    assert [cell.get("output_tokens_per_s") for cell in cells] == [None, 200, 10, 7, 50]


def test_goals_over_http_take_medians_and_read_older_cells(tmp_path: Path):
    """Cells of one run, from before there were repeats, have the same figures at the same place."""
    what, base = "text, fixed lengths", {"model": "internvl3-8b", "scenario": "http"}
    older = {**base, "dtype": "auto", "what": what, "output_tokens_per_s": 100.0}
    older |= {"first_token_ms": [1.0, 2.0]}
    repeats = [{"seed": s, "output_tokens_per_s": rate} for s, rate in enumerate((40, 101, 500))]
    newer = {**base, "dtype": "calibquant1", **serving_http.combined(what, repeats)}
    content = {"date": "20260101T000000", "command": "c", "device": "GPU", "run": "r"}
    save_record(tmp_path / "serving-20260101T000000.json", {**content, "cells": [older, newer]})
    runs = load_runs(tmp_path)
    row = next(row for row in ROWS if row.name.endswith("over HTTP, fixed lengths"))
    found = ratio(row, "auto", runs)
    assert found is not None and (found.ours, found.baseline) == (101, 100)
    lines = report.dtypes_region(runs, report.HTTP_COLUMNS)
    assert "| `auto` (bf16) | - | 100 | - | - | - | - | - | - | - | - |" in lines
    assert "| **`calibquant1`** | - | 101 | - | - | - | - | - | - | - | - |" in lines


def test_samples_are_thinned_evenly():
    assert serving_http.thinned(range(257)) == range(0, 257, 2)
    assert serving_http.thinned(range(256)) == range(256)
    assert len(serving_http.thinned([])) == 0


def test_a_record_is_compact_and_names_its_origin(record: Path):
    content = json.loads(record.read_text())
    assert {"command", "device", "driver", "versions", "date", "settings"} <= content.keys()
    assert content["commit"] == "unknown" or re.match("[0-9a-f]{40}(-dirty)?$", content["commit"])
    assert "benchmarks.serving" in content["command"]
    assert len(record.read_text()) < 100_000


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_record_names_the_commit_of_the_working_copy(tmp_path: Path, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert commit(copy) == "unknown"

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "core.hooksPath="]
        done = subprocess.run(["git", *who, *arguments], cwd=copy, capture_output=True, check=True)
        return done.stdout.decode().strip()

    file = copy / "file"
    file.write_text("a")
    git("init")
    git("add", "file")
    git("commit", "-m", "message")
    git("tag", "-a", "v1", "-m", "message")
    assert commit(copy) == git("rev-parse", "HEAD")
    (copy / "record").write_text("new")
    assert commit(copy) == git("rev-parse", "HEAD")
    file.write_text("b")
    assert commit(copy) == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit(copy) == "unknown"


def test_devices_share_the_engines(tmp_path: Path, monkeypatch):
    """Two devices, one of them slow: jobs in order, each pinned, all cells in one record."""
    others_done = threading.Event()
    started: list[tuple[str, str]] = []

    class Engine:
        def __init__(self, job, folder, env):
            self.job, self.device = job, env["CUDA_VISIBLE_DEVICES"]
            started.append((job["dtype"], self.device))

        def run(self):
            yield {"event": "start"}
            if self.job["dtype"] == "a":
                assert others_done.wait(10)
            if self.job["dtype"] == "e":
                others_done.set()
            yield {"scenario": "resident", "requests": 1}

        def stop(self):
            pass

    monkeypatch.setattr(serving, "Engine", Engine)
    todo = [{"model": "m", "dtype": d, "scenarios": ["resident"]} for d in "abcde"]
    record = {"engines": [], "cells": []}
    path = tmp_path / "record.json"
    serving.Benchmark(deque(todo), ["0", "1"], record, path).run()
    assert [dtype for dtype, _ in started] == list("abcde")
    slow = dict(started)["a"]
    # The slow device may have prepared one engine ahead; all others went to the other device.
    assert [d for _, d in started].count(slow) <= 2
    saved = json.loads(path.read_text())
    assert {(c["dtype"], c["gpu"]) for c in saved["cells"]} == set(started)
    assert len(saved["engines"]) == len(saved["cells"]) == 5

    def broken(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(serving, "Engine", broken)
    with pytest.raises(OSError, match="no more processes"):
        serving.Benchmark(deque(todo), [None], record, path).run()


def test_questions_come_back_to_images(tmp_path: Path):
    """What the client sends: images as data, several questions on each, not in a row."""
    load = serving_http.DRY_LOAD
    runs = dict(serving_http.loads(tmp_path, serving.DRY_MODEL, load))
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    asked = [json.loads(line)["content"] for line in lines]
    images = [content[0]["image_url"]["url"] for content in asked]
    assert all(image.startswith("data:image/png;base64,") for image in images)
    assert len(images) == load.images * load.questions and len(set(images)) == load.images
    assert len({content[1]["text"] for content in asked}) == len(asked)
    assert images != sorted(images) and images != sorted(images, reverse=True)
    assert runs["questions on images"][-1] == str(len(asked))


def made_up(folder: Path, date: str, device: str = "GPU", **requests: int) -> None:
    """A record with a few cells, as if measured on a GPU."""
    cells = []
    for dtype, number in requests.items():
        base = {"model": "internvl3-8b", "dtype": dtype, "budget_gb": 5}
        cells.append({**base, "scenario": "resident", "outputs": 128, "requests": number})
        cells.append({**base, "scenario": "http", "what": "start", "seconds": 7 * number})
        late = {"what": "compiled while serving", "kernels": "_a_kernel, _b_kernel"}
        cells.append({**base, "scenario": "http", **late})
        for budget, speed in ((2, 10 * number), (5, 20 * number)):
            point = {"budget_gb": budget, "outputs": 300, "requests": number}
            name = "decode" if budget == 2 else "resident"
            cells.append({**base, "scenario": name, **point, "decode_tokens_per_s": speed})
        video = {"visual_tokens": 66560, "first_token_ms": [200.0 * number]}
        cells.append({**base, "scenario": "video", **video, "step_ms_median": None})
        for budget in (5, 2):
            end = {"budget_gb": budget, "outputs": 1024, "first_token_ms_p99": 60 * budget + number}
            cells.append({**base, "scenario": "end-to-end", **end})
        for share in (0, 50, 100):
            speed = 1000 - 2 * share if dtype == "fp8" else 700 + 10 * share
            point = {"visual_share": share, "requests": 10, "decode_tokens_per_s": speed}
            cells.append({**base, "scenario": "mix", **point})
    content = {"date": date, "command": "c", "device": device, "run": date[:10], "cells": cells}
    save_record(folder / f"serving-{date}.json", content)


def test_ratios_stay_within_a_run(tmp_path: Path):
    made_up(tmp_path, "20260101T000000", auto=10, calibquant1=85)
    made_up(tmp_path, "20260102T000000", calibquant1=90)
    made_up(tmp_path, "20260102T000001", device="other GPU", auto=30)
    runs = load_runs(tmp_path)
    assert len(runs) == 3
    found = ratio(ROWS[0], "auto", runs)
    assert found is not None
    assert (found.ours, found.baseline, found.run.name) == (85, 10, "20260101T0")
    lines = summary_lines(runs)
    assert lines[0] == (
        "requests resident at 5 GB, 128 outputs: against auto 8.50x (goal >= 8: met), "
        "against fp8 not measured (goal >= 4)"
    )
    assert [line.split(":")[0] for line in lines[: len(ROWS)]] == [
        row.name.split(":")[0] for row in ROWS
    ]


@pytest.mark.parametrize(
    ("goal", "value", "said"),
    [
        (at_least(8), 8.708, "8.71x, goal >= 8: met"),
        (at_least(8), 8.0, "8.000x, goal >= 8: met"),
        (at_least(8), 7.99996, "7.99996x, goal >= 8: missed"),
        (at_least(1.7), 1.7004, "1.7004x, goal >= 1.7: met"),
        (at_most(0.25), 0.18, "0.18x, goal <= 0.25: met"),
        (at_most(1.03), 1.0384, "1.038x, goal <= 1.03: missed"),
        (at_most(1.03), 1.0303, "1.0303x, goal <= 1.03: missed"),
        (at_most(1.03), 0.926, "0.93x, goal <= 1.03: met"),
        (at_least(0.98), 0.9796, "0.9796x, goal >= 0.98: missed"),
        (at_least(0.98), 1.0, "1.000x, goal >= 0.98: met"),
        (at_least(0.98), 0.8, "0.80x, goal >= 0.98: missed"),
    ],
)
def test_a_ratio_never_seems_to_meet_a_goal_that_it_misses(goal: Goal, value: float, said: str):
    assert f"{goal.spell(value)}x, {goal.verdict(value)}" == said


def test_a_cell_that_was_disturbed_does_not_count(tmp_path: Path):
    made_up(tmp_path, "20260101T000000", auto=10, calibquant1=85)
    path = next(tmp_path.iterdir())
    record = json.loads(path.read_text())
    record["cells"][0] |= {"planted_share": 0.99, "most_running": 10, "preemptions": 3}
    save_record(path, record)
    assert ratio(ROWS[0], "auto", load_runs(tmp_path)) is None


def test_chats_of_several_images_are_told_from_those_of_one(tmp_path: Path):
    made_up(tmp_path, "20260101T000000", auto=10)
    path = next(tmp_path.iterdir())
    record = json.loads(path.read_text())
    chats = {"model": "internvl3-8b", "dtype": "auto", "scenario": "image-chats"}
    chats |= {"budget_gb": 2, "working_set": 6}
    record["cells"] += [{**chats, "turns_per_s": 10, "images_a_user": 1}]
    record["cells"] += [{**chats, "turns_per_s": 4, "images_a_user": 3}]
    save_record(path, record)
    (run,) = load_runs(tmp_path)
    row = next(row for row in ROWS if row.name.endswith("turns/s"))
    assert row.figure.of(run, "auto") == 10


def test_crossings_are_interpolated(tmp_path: Path):
    made_up(tmp_path, "20260101T000000", fp8=20, calibquant1=85)
    (run,) = load_runs(tmp_path)
    assert crossings(run, "fp8", "decode_tokens_per_s") == [pytest.approx(23.7, abs=0.1)]
    assert crossings(run, "auto", "decode_tokens_per_s") is None


def test_readme_says_what_the_records_say():
    """As ``python -m benchmarks.report --check`` does."""
    assert report.problems() == []


def test_a_readme_edited_by_hand_is_noticed(tmp_path: Path):
    made_up(tmp_path, "20260101T000000", auto=10, fp8=20, calibquant1=85)
    readme = tmp_path / "README.md"
    marks = [line for name in report.REGIONS for line in (report.begin(name), report.end(name))]
    readme.write_text("\n".join(["before", *marks, "after"]))
    text = report.render(readme.read_text(), tmp_path)
    assert "8.50x (85 against 10), goal >= 8: met" in text
    assert "Goals: 8 of 8 are met." in text
    for line in (
        "| `auto` (bf16) | 70 | - | - | - | - | - | - | - | - | `_a_kernel`, `_b_kernel` |",
        "| **`calibquant1`** | 850 (85) | 1,700 (85) | - | - |",
        "| `calibquant1` against `fp8` | 4.2x | 4.2x | - | - |",
        "| `fp8` | - | - | 4,000 | - | - | - |",
        "| 5 GB, `fp8` | - | - | - | 320 | - | - |",
        "| 2 GB, **`calibquant1`** | - | - | - | 205 | - | - |",
    ):
        assert line in text.splitlines(), line
    assert text.startswith("before\n") and text.endswith("\nafter")
    assert report.render(text, tmp_path) == text
    readme.write_text(text)
    data = report.plot_data(load_runs(tmp_path))
    assert [p.split(";")[0] for p in report.problems({readme: report.REGIONS}, tmp_path)] == [
        f"{report.PLOT} does not show what the records say"
    ]
    pytest.importorskip("matplotlib", reason="plots are drawn where matplotlib is installed")
    report.plot(data, tmp_path / report.PLOT)
    assert report.problems({readme: report.REGIONS}, tmp_path) == []
    readme.write_text(text.replace("85 against", "95 against"))
    assert len(report.problems({readme: report.REGIONS}, tmp_path)) == 1
    with pytest.raises(ValueError, match="are needed, once each"):
        report.render("no marks", tmp_path)


def test_a_dtype_may_have_a_transform_or_a_profile(tmp_path: Path):
    directory = make_model("internvl-tiny", tmp_path / "model")
    assert cache_settings("fp8", directory) == {"kv_cache_dtype": "fp8"}
    turned = cache_settings("calibquant1+hadamard", directory)
    assert load_config(**as_given(turned)).transform == "hadamard"
    learned = cache_settings("calibquant1+profile1", directory)
    path = load_config(**as_given(learned)).profile
    assert path is not None
    profile = load_profile(path)
    assert profile.average_bits == 1
    assert {layer.key.bits.count(0) > 0 for layer in profile.layers.values()} == {True}
    assert len({sum(layer.key.bits) for layer in profile.layers.values()}) > 1


def as_given(settings: dict) -> dict:
    return {
        "cache_dtype": settings["kv_cache_dtype"],
        "additional_config": settings["additional_config"],
    }
