"""The accuracy benchmark: its statistics by hand, and its modes on real engines."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import accuracy_engines, accuracy_report
from benchmarks.accuracy import PROFILES, Results, main, parse_args, summary_lines
from benchmarks.accuracy_data import PART, Parts, Row, batches, chat, load_rows, other_questions
from benchmarks.accuracy_engines import InProcess, Setting
from benchmarks.accuracy_jobs import Message, Outcome, divide, run_units
from benchmarks.accuracy_metrics import agreement, divergence, mean_drop, wilson
from benchmarks.records import RECORDS
from tests.serving.test_server import Server
from tests.tinyvlm import dataset
from tests.tinyvlm.generator import TASKS
from tests.tinyvlm.unpack import model_path

IMAGE_TOKENS = 576
ROOT = Path(__file__).parents[1]


def benchmark(*arguments: object) -> str:
    command = [sys.executable, "-m", "benchmarks.accuracy", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def the_record(folder: Path) -> dict:
    (path,) = folder.glob("accuracy-*.json")
    return json.loads(path.read_text())


# Statistics.


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 27.75), (8, 10, 49.02, 94.33), (50, 100, 40.38, 59.62), (10, 10, 72.25, 100.0)],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=0.01)


def test_divergence_of_whole_distributions_is_exact() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    sides = ({t: math.log(x) for t, x in enumerate(side)} for side in (p, q))
    assert divergence(*sides) == pytest.approx(exact, abs=1e-6)


def test_divergence_of_candidates_is_a_lower_bound() -> None:
    draw = random.Random(0)
    for _ in range(200):
        weights = [[draw.random() ** 6 + 1e-9 for _ in range(30)] for _ in range(2)]
        p, q = ([w / sum(side) for w in side] for side in weights)
        exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        top = [
            {t: math.log(side[t]) for t in sorted(range(30), key=lambda t: -side[t])[:8]}
            for side in (p, q)
        ]
        assert 0 <= divergence(*top) <= exact + 1e-6
        assert divergence(top[0], top[0]) == pytest.approx(0, abs=1e-6)


def test_nothing_in_common() -> None:
    """The bound knows then that one side's candidates are unlikely for the other, and no more."""
    assert divergence({1: math.log(0.9)}, {2: math.log(0.9)}) == 0


def test_agreement_ends_where_answers_part() -> None:
    assert agreement([(1, 2, 3, 4)], [(1, 9, 3, 4)]) == 25
    assert agreement([(1, 2), (5, 6)], [(1, 2), (5, 6, 7, 8)]) == pytest.approx(100 * 4 / 6)
    assert agreement([(), ()], [(), ()]) is None  # of servers that do not say them


def test_drop_is_a_mean_over_tasks_of_pairs() -> None:
    drop, half = mean_drop(
        {"a": [True] * 4, "b": [True, False]}, {"a": [True] * 3 + [False], "b": [False, True]}
    )
    assert drop == pytest.approx(100 * (0.25 + 0) / 2)
    # Variances of the differences 0, 0, 0, 1 and 1, -1, over 4 and 2 questions.
    assert half == pytest.approx(100 * 1.959964 * math.sqrt(0.25 / 4 + 2 / 2) / 2)


# Questions.


def test_setting() -> None:
    text = "calibquant1  calibration=false layers_16bit=[0,1] range_estimator=quantile"
    setting = Setting.parse(text)
    assert setting.dtype == "calibquant1" and setting.bits == 1
    assert setting.options == {
        "calibration": False,
        "layers_16bit": [0, 1],
        "range_estimator": "quantile",
    }
    assert [Setting.parse(d).bits for d in ("auto", "fp8", "calibquant4")] == [16, 8, 4]


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (level,) * 3)


def test_right_answers() -> None:
    strict = Row("t", "?", ("K 13",), grey(0))
    assert strict.is_right(" K 13\n") and not strict.is_right("k 13") and not strict.is_right("K")
    loose = Row("t", "?", ("Bus stop", "a bus"), grey(0), loose=True)
    assert loose.is_right("bus  STOP.") and loose.is_right("A bus") and not loose.is_right("bus")


def test_no_batch_has_an_image_twice() -> None:
    rows = [Row("t", f"{i}?", ("",), grey(i // 3)) for i in range(12)]
    found = batches(rows, 3)
    assert sorted(i for batch in found for i in batch) == list(range(12))
    assert max(map(len, found)) == 3
    for batch in found:
        assert len({rows[i].image_hash for i in batch}) == len(batch)


def test_other_question() -> None:
    rows = [Row(t, q, ("",), grey(0)) for t, q in ("a1", "b1", "a1", "a2", "b1")]
    assert other_questions(rows) == ["2", "What is this?", "2", "1", "What is this?"]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    """Two questions of each task, as a file of a user's."""
    folder = tmp_path_factory.mktemp("data")
    dataset.write(folder, dataset.examples(count=2))
    return folder / "qa.jsonl"


def test_rows_of_a_file(jsonl: Path) -> None:
    examples = list(dataset.examples(count=1))
    rows = load_rows(str(jsonl), 1, " Briefly.")
    assert [(r.task, r.question, r.answers) for r in rows] == [
        (e.task, f"{e.question} Briefly.", (e.answer,)) for e in examples
    ]
    assert [r.image.tobytes() for r in rows] == [e.image.tobytes() for e in examples]


def test_rows_of_datasets(tmp_path: Path) -> None:
    """Columns as ChartQA has them, and as DocVQA and TextVQA do; what they ask is answered."""
    examples = list(dataset.examples(count=2, tasks=("field",)))
    for name, question, answer in (("chart", "query", "label"), ("doc", "question", "answers")):
        folder = tmp_path / name / "validation"
        folder.mkdir(parents=True)
        with (folder / "metadata.jsonl").open("w") as lines:
            for i, example in enumerate(examples):
                example.image.save(folder / f"{i}.png")
                row = {"file_name": f"{i}.png", question: example.question}
                lines.write(json.dumps({**row, answer: [example.answer, "x"]}) + "\n")
        (row,) = load_rows(str(tmp_path / name), 1, "")
        assert (row.task, row.question) == (name, examples[0].question)
        assert row.answers == (examples[0].answer, "x")
        assert row.image.tobytes() == examples[0].image.tobytes()
    benchmark(
        *("--data", tmp_path / "chart", tmp_path / "doc", "--suffix", "", "--count", 2),
        *("--settings", "auto", "--modes", "decode", "--kl-count", 0, "--out", tmp_path),
    )
    (setting,) = the_record(tmp_path)["settings"]
    tasks = setting["modes"]["decode"]["tasks"]
    assert {task: (found["n"], found["exact_match"]) for task, found in tasks.items()} == {
        "chart": (2, 100),
        "doc": (2, 100),
    }


def test_missing_column(tmp_path: Path) -> None:
    grey(1).save(tmp_path / "1.png")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"image": "1.png", "question": "?", "reply": "!"}) + "\n")
    with pytest.raises(ValueError, match="no answers or answer or label"):
        load_rows(str(file), 1)


def test_other_models_need_data(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--model", "someone/else"])
    assert "--model and --base-url need --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--data", "a.jsonl", "--base-url", "auto", "calibquant1=http://b/v1"])
    assert "SETTING=http…, got 'auto'" in capsys.readouterr().err


class OtherServer(BaseHTTPRequestHandler):
    """A server that is not vLLM: it refuses what it does not know, and has no log-probabilities."""

    def do_GET(self) -> None:
        self._say(200, {"object": "list", "data": [{"id": "other", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "cache_salt" in asked:
            self._say(400, {"error": {"message": "Unrecognized request argument: cache_salt"}})
            return
        answer = {"role": "assistant", "content": asked["messages"][-1]["content"].upper()}
        self._say(200, {"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}]})

    def _say(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_servers_that_are_not_vllm() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServer) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        with accuracy_engines.Server(f"http://127.0.0.1:{http.server_port}/v1", 8, 4) as server:
            chats = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
            assert [a.text for a in server.ask(chats)] == ["ONE", "TWO", "THREE"]
            assert {(a.tokens, a.hit) for a in server.ask(chats)} == {((), None)}
        http.shutdown()


def test_servers_of_settings_with_options() -> None:
    pairs = ["auto=http://a/v1", "calibquant1 profile=x.safetensors=https://b/v1?key=1"]
    args = parse_args(["--data", "a.jsonl", "--base-url", *pairs])
    assert args.base_url == {
        "auto": "http://a/v1",
        "calibquant1 profile=x.safetensors": "https://b/v1?key=1",
    }


def test_a_gpu_is_asked_for_what_it_serves(monkeypatch) -> None:
    name = "calibquant1 preset=calibquant-paper"
    asked = {}
    for cuda in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        asked[cuda] = parse_args([]).settings
    assert {name, f"{name} range_scope=request", "calibquant1 range_scope=request"} <= {
        *asked[False]
    }
    assert name in asked[True] and asked[True][0] == asked[False][0] == "auto"
    left_out = ("range_scope=request", "two-means", "unbiased-slope")
    assert not [s for s in asked[True] if s.endswith(left_out)]


# Many engines at once.


@pytest.mark.parametrize(("jobs", "shards"), [(1, 1), (5, 1), (6, 2), (60, 4)])
def test_every_mode_asks_every_part_once(jobs: int, shards: int) -> None:
    units = divide(3, ["decode", "prefix-hit"], 4, jobs)
    assert len(units) == 3 * shards
    for setting in range(3):
        mine = [u for u in units if u.setting == setting]
        assert sorted(part for u in mine for part in u.parts) == [0, 1, 2, 3]
        assert {u.modes for u in mine} == {("decode", "prefix-hit")}
    cut = divide(2, ["decode", "chunks"], 1, jobs)
    assert [(u.setting, u.modes) for u in cut] == [
        (0, ("decode",)),
        (1, ("decode",)),
        (0, ("chunks",)),
        (1, ("chunks",)),
    ]


def engine_of_a_test(unit, setting, parts, args, report) -> None:
    """Stands in for an engine, in a process of its own: right, refusing, or killed."""
    report("size", 8.0)
    for part in unit.parts:
        rows = parts[part]
        if setting.name == "refuses" and part:
            raise ValueError("a long story\nno such dtype")
        if setting.name == "dies":
            os._exit(3)
        report("asked", len(rows))
        report("part", ("decode", part, [Outcome(r.task, True, (1, 2), 0, None) for r in rows]))
    report("done", 1.5)


def test_what_fails_takes_nothing_along(tmp_path: Path) -> None:
    rows = [Row("a", "?", ("",), grey(i)) for i in range(PART)]
    rows += [Row("b", "?", ("",), grey(9)), Row("a", "?", ("",), grey(8))]
    parts = Parts.of(rows, tmp_path)
    assert [len(parts[i]) for i in range(len(parts))] == [PART + 1, 1]
    settings = [Setting.parse(name) for name in ("auto", "refuses", "dies")]
    units = divide(3, ["decode"], len(parts), 3)
    with tqdm(total=3 * len(rows), disable=True) as bar:
        results = Results(units, settings, bar)
        args = argparse.Namespace(jobs=3, limit=60, base_url=None)
        run_units(units, settings, parts, args, results.take, engine_of_a_test)
    whole, part, none = results.settings_record()
    counts = {task: found["n"] for task, found in whole["modes"]["decode"]["tasks"].items()}
    assert counts == {"a": PART + 1, "b": 1}
    assert (whole["seconds"], whole["bytes_per_visual_token"]) == (1.5, 8.0)
    assert part["modes"]["decode"]["tasks"]["a"]["n"] == PART
    assert part["error"] == "ValueError: no such dtype"
    assert none["modes"] == {} and none["error"] == "ended with exit code 3"


def run_here(units, settings, parts, args, take) -> None:
    """``run_units`` without processes, on engines of a test."""
    for i, unit in enumerate(units):
        report = partial(lambda i, kind, content: take(Message(i, kind, content)), i)
        engine_of_a_test(unit, settings[unit.setting], parts, args, report)
        if settings[unit.setting].name == "refuses":
            report("error", "after all")


def test_a_run_fails_with_one_of_its_settings(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which the benchmark adds to
    monkeypatch.setattr("benchmarks.accuracy.run_units", run_here)
    with pytest.raises(SystemExit, match=r"not measured to the end: refuses$"):
        main(["--quick", "--settings", "auto", "refuses", "--count", "2", "--out", str(tmp_path)])
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert (record["count"], record["modes"]) == (2, ["decode", "prefix-hit"])  # given, and quick
    assert "Mode decode: exact match" in capsys.readouterr().out


def test_a_quick_run_ends_with_its_drops_and_needs_no_matplotlib(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which the benchmark adds to
    monkeypatch.setattr("benchmarks.accuracy.run_units", run_here)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(["--quick", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "no plot: matplotlib is not installed" in out
    last = "accuracy_drop bits1=0.0 bits1.25=0.0 bits1.5=0.0 bits2=0.0"
    assert out.splitlines()[-1] == last
    (record,) = tmp_path.iterdir()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    (pattern,) = (line for line in ignored if line.startswith("benchmarks/records/accuracy"))
    assert (RECORDS / record.name).relative_to(ROOT).match(pattern)
    assert not [p for p in RECORDS.glob("accuracy-[0-9]*") if p.relative_to(ROOT).match(pattern)]


# Engines.


def test_teacher_forcing(monkeypatch) -> None:
    """Forced while decoding, tokens get the log-probabilities that they have in a prompt."""
    from vllm import SamplingParams

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # and back, after the engine has
    (example,) = dataset.examples(count=1, tasks=("line",))
    wrong = "Tax: 900"
    settings = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}
    with InProcess(
        str(model_path()), Setting.parse("auto"), 8, enforce_eager=True, **settings
    ) as engine:
        tokens = engine.tokenizer.encode(wrong, add_special_tokens=False)
        (steps,) = engine.distributions([chat([example.image], example.question)], [wrong])
        question = engine.tokenizer.encode(f"{example.question}\n", add_special_tokens=False)
        prompt = {
            "prompt_token_ids": [1, 4, *question, *tokens],
            "multi_modal_data": {"image": example.image},
        }
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = engine.llm.generate([prompt], params, use_tqdm=False)
    assert len(steps) == len(tokens) + 1
    expected = output.prompt_logprobs[-len(tokens) :]
    for token, step, scored in zip(tokens, steps, expected, strict=False):
        assert step[token] == pytest.approx(scored[token].logprob, abs=1e-3)
    assert min(step[token] for token, step in zip(tokens, steps, strict=False)) < -1


def test_teacher_forcing_of_batches() -> None:
    """Rows in any order, at any step of their requests, with and without forced tokens."""
    from vllm import SamplingParams

    from benchmarks.accuracy_forcing import FORCED, ForcedTokensV2

    state = SimpleNamespace(
        max_num_reqs=4,
        device=torch.device("cpu"),
        prompt_len=SimpleNamespace(np=np.array([5, 9, 7, 0])),
    )
    processor = ForcedTokensV2(None, state)
    forced = SamplingParams(extra_args={FORCED: [3, 1]})
    assert processor.add_request(2, forced) and processor.add_request(0, forced)
    assert not processor.add_request(1, SamplingParams())
    logits = torch.arange(24.0).reshape(4, 6)
    context = SimpleNamespace(
        # Slot 2 after its prompt; slot 1; slot 0 one token, and two tokens, further on.
        expanded_idx_mapping=torch.tensor([2, 1, 0, 0]),
        pos=torch.tensor([6, 8, 5, 6]),
    )
    result = processor.apply(logits.clone(), context)
    left = [row.isfinite().nonzero().flatten().tolist() for row in result]
    assert left == [[3], [0, 1, 2, 3, 4, 5], [1], [0, 1, 2, 3, 4, 5]]
    assert result[0, 3] == logits[0, 3]
    assert not processor.add_request(2, SamplingParams())  # the slot's next request
    assert torch.equal(processor.apply(logits.clone(), context)[0], logits[0])


def test_modes(tmp_path: Path) -> None:
    out = benchmark(
        *("--count", 1, "--kl-count", 1, "--out", tmp_path, "--settings"),
        *("auto", "calibquant4", "calibquant1 layers_16bit=[0]"),
    )
    record = the_record(tmp_path)
    sixteen, four, one = record["settings"]
    assert [s["bytes_per_visual_token"] for s in record["settings"]] == pytest.approx(
        [3072, 3072 / 3, 3072 * (1 + 5 / 14) / 6]
    )
    for mode in ("decode", "prefix-hit", "chunks"):
        for setting in record["settings"]:
            result = setting["modes"][mode]
            # One question of ten is on two images.  Pages of stock vLLM have 128 tokens here.
            page = 128 if setting["setting"] == "auto" else 16
            ends = [IMAGE_TOKENS] * 9 + [2 * IMAGE_TOKENS]
            hits = [end // page * page for end in ends]
            assert result["mean_hit_tokens"] == (sum(hits) / 10 if mode == "prefix-hit" else 0)
            assert [t["n"] for t in result["tasks"].values()] == [1] * 10
        assert sixteen["modes"][mode]["mean"] == 100
        assert sixteen["modes"][mode]["agreement"] == 100
        # Codes are read, which changes little at 4 bits and much at 1.
        assert 0 < four["modes"][mode]["kl"] < 0.01 < one["modes"][mode]["kl"]
        assert four["modes"][mode]["drop"] == 0
        assert f"Mode {mode}: exact match in %" in out
    assert record["command"].startswith("python -m benchmarks.accuracy --count 1")
    assert out.splitlines()[-1] == "accuracy_drop bits4=0.0"


def test_servers(tmp_path: Path, jsonl: Path) -> None:
    """One server under two names, asked about a file."""
    server = Server(model_path(), tmp_path / "log", "calibquant4")
    try:
        server.wait(240)
        url = server.client.base_url
        out = benchmark(
            *("--base-url", f"auto={url}", f"calibquant4={url}", "--data", jsonl),
            *("--suffix", "", "--batch", 3, "--count", 1, "--out", tmp_path),
        )
        hits = server.metrics()["vllm:prefix_cache_hits_total"]
    finally:
        server.stop()
    record = the_record(tmp_path)
    assert record["modes"] == ["decode", "prefix-hit"]
    for setting in record["settings"]:
        for result in setting["modes"].values():
            assert (result["mean"], result["agreement"], result["kl"]) == (100, 100, None)
    # Salts keep modes and names apart: only a question on an image that was looked at hits.
    assert hits == 2 * len(TASKS) * IMAGE_TOKENS
    assert out.splitlines()[-1] == "accuracy_drop bits4=0.0"


def test_summary(capsys, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which the benchmark adds to
    main(["--summary"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    for name, line in zip(("accuracy_drop_prefix_hit", "accuracy_drop"), lines, strict=True):
        pattern = r" bits1=(\S+) bits1\.25=(\S+) bits1\.5=(\S+) bits2=(\S+)(?: bits4=\S+)?"
        found = re.fullmatch(name + pattern, line)
        assert found
        one, _, three_halves, two = map(float, found.groups())
        assert three_halves <= one + 0.5
        assert two < 5


def test_a_profile_stands_for_its_width() -> None:
    def setting(name: str, bits: float, *drops: float) -> dict:
        modes = zip(("decode", "prefix-hit"), drops, strict=False)
        return {"setting": name, "bits": bits, "modes": {m: {"drop": d} for m, d in modes}}

    settings = [
        setting("auto", 16, 0.0, 0.0),
        setting("calibquant1", 1, 20.0, 30.0),
        setting(PROFILES[0], 1.0, 2.0, 3.0),
        setting(PROFILES[1], 1.25, 0.5),
        setting("calibquant1 calibration=false", 1, 50.0, 50.0),
        setting("calibquant2", 2, 0.1, 0.2),
    ]
    assert summary_lines({"settings": settings}).splitlines() == [
        "accuracy_drop_prefix_hit bits1=3.0 bits2=0.2",
        "accuracy_drop bits1=2.0 bits1.25=0.5 bits2=0.1",
    ]
    settings.insert(1, settings.pop(2))
    assert "accuracy_drop bits1=2.0" in summary_lines({"settings": settings})


def test_report_takes_the_newest_of_every_setting(tmp_path: Path) -> None:
    def entry(setting: str, bits: float, size: float | None, right: str | None) -> dict:
        result = {
            "tasks": {"a": {"n": 4, "exact_match": 25 * (right or "").count("1")}},
            "mean": 25.0 * (right or "").count("1"),
            "drop": 100 - 25.0 * (right or "").count("1"),
            "drop_half_interval": 1.0,
        }
        modes = {} if right is None else dict.fromkeys(("decode", "prefix-hit"), result)
        return {"setting": setting, "bits": bits, "bytes_per_visual_token": size, "modes": modes}

    def write(date: str, data: str, *settings: dict) -> None:
        record = {"date": date, "device": "GPU", "model": "m", "data": data, "settings": settings}
        (tmp_path / f"accuracy-{date}.json").write_text(json.dumps(record))

    profile = entry("calibquant1 profile=x/y.safetensors", 1.0, 14.0, "1110")
    sixteen = entry("auto", 16, 200.0, "1111")
    write("20260101", "other questions", entry("calibquant4", 4, 60.0, "0000"))
    write("20260102", "these", sixteen, entry("calibquant1", 1, 14.0, "0000"), profile)
    stock = entry("turboquant_3bit_nc", 16, 200.0, "1111"), entry("int4_x", 16, 50.0, None)
    write("20260103", "these", sixteen, entry("calibquant1", 1, 14.0, "1000"), *stock)
    text = "\n".join(accuracy_report.accuracy_region(tmp_path))
    assert "| 16 bits | 200 | 100.0 | 100.0 |" in text
    assert "| `calibquant1` | 14 | 25.0 (75.0 ± 1.0) | 25.0 (75.0 ± 1.0) |" in text
    assert text.count("accuracy-20260103.json") == 2 and "accuracy-20260102" not in text
    assert "TurboQuant's bytes mislead here" in text
    assert "`int4_x` of stock vLLM ended in an error" in text
    assert "75 in `a`" in text and "calibquant4" not in text
    text = "\n".join(accuracy_report.profiles_region(tmp_path))
    assert "| profile of 1 bit | 14 | 75.0 (25.0 ± 1.0) |" in text
    assert "4 questions of each kind. GPU, 20260103: [accuracy-20260103.json]" in text
    assert "; GPU, 20260102: [accuracy-20260102.json]" in text
    record = accuracy_report.together(tmp_path)
    assert record["modes"] == ["decode", "prefix-hit"] and record["settings"][0] == sixteen
    assert summary_lines(record).splitlines()[-1] == "accuracy_drop bits1=25.0"
    with pytest.raises(FileNotFoundError, match=r"run python -m benchmarks\.accuracy"):
        accuracy_report.together(tmp_path / "none")
