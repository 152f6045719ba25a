"""What the records of :mod:`benchmarks.serving` say, as ratios between KV cache dtypes of one run.

A *run* is what ran on one kind of device under one name (``--run``), in one record or several.  A
ratio has both its sides from one run; where several runs have them, the newest one counts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import RECORDS

STOCK, EIGHT_BITS, OURS = "auto", "fp8", "calibquant1"
MODEL = "internvl3-8b"
NOT_MEASURED = "not measured"


def measured(cell: dict[str, Any]) -> bool:
    """Whether a cell holds what it set out to measure.

    Where prompts were planted, all requests must have been in the pool at once and to their end.
    """
    if "error" in cell or cell.get("timed_out"):
        return False
    if "planted_share" in cell:
        return cell["preemptions"] == 0 and cell["most_running"] == cell["requests"]
    return True


@dataclass
class Run:
    """Cells of one run."""

    name: str
    device: str
    date: str
    """Of its newest record."""
    cells: list[dict[str, Any]] = field(default_factory=list)

    def find(
        self, scenario: str, dtype: str, model: str = MODEL, **keys: Any
    ) -> dict[str, Any] | None:
        """The newest cell with these keys that holds a measurement."""
        wanted = {"scenario": scenario, "dtype": dtype, "model": model, **keys}
        for cell in reversed(self.cells):
            if all(cell.get(k) == v for k, v in wanted.items()) and measured(cell):
                return cell
        return None

    def dtypes(self, model: str = MODEL) -> list[str]:
        """KV cache dtypes with cells, in order of first appearance."""
        return list(dict.fromkeys(c["dtype"] for c in self.cells if c["model"] == model))


def load_runs(folder: Path = RECORDS) -> list[Run]:
    """Runs of all records that are not dry, newest first."""
    runs: dict[tuple[str, str], Run] = {}
    for path in sorted(folder.glob("serving-[0-9]*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("dry_run"):
            continue
        key = record["run"], record["device"]
        run = runs.setdefault(key, Run(*key, record["date"]))
        run.date = max(run.date, record["date"])
        run.cells += [{"record": path.name, **cell} for cell in record["cells"]]
    return sorted(runs.values(), key=lambda run: run.date, reverse=True)


class Figure(NamedTuple):
    """One number of a run: where in its cells it stands."""

    scenario: str
    name: str
    """Of the number in a cell, or of raw samples, whose median counts."""
    keys: dict[str, Any]
    """What tells the cell from others of its scenario."""

    def cell(self, run: Run, dtype: str, model: str = MODEL) -> dict[str, Any] | None:
        """The cell that has the number."""
        return run.find(self.scenario, dtype, model, **self.keys)

    def of(self, run: Run, dtype: str, model: str = MODEL) -> float | None:
        """The number, if it was measured."""
        return self.read(self.cell(run, dtype, model))

    def read(self, cell: dict[str, Any] | None) -> float | None:
        """The number in such a cell."""
        value = None if cell is None else cell.get(self.name)
        if isinstance(value, list):
            return statistics.median(value) if value else None
        return value


def figure(scenario: str, name: str, **keys: Any) -> Figure:
    """Shorthand."""
    return Figure(scenario, name, keys)


NO_HARM = {
    f"{what}: {label}": figure("no-harm", name, what=what)
    for what, name, label in (
        ("text, fixed lengths", "output_tokens_per_s_median", "output tokens/s"),
        ("text, chat lengths", "output_tokens_per_s_median", "output tokens/s"),
        ("lone image request", "first_token_ms_median", "first token, ms"),
        ("lone text request", "first_token_ms_median", "first token, ms"),
        ("lone image request", "step_ms_median", "decode step, ms"),
        ("lone text request", "step_ms_median", "decode step, ms"),
    )
}
"""What codes cost where they cannot help."""


class Goal(NamedTuple):
    """A bound that a ratio must keep, itself included."""

    sign: str
    """``<=`` or ``>=``."""
    bound: float

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps it."""
        return ratio <= self.bound if self.sign == "<=" else ratio >= self.bound

    def spell(self, ratio: float) -> str:
        """A ratio with two decimals, three near the bound, more where it would seem to be on it."""
        few = 3 if math.isclose(ratio, self.bound, rel_tol=0.05) else 2
        for decimals in range(few, 12):
            text = f"{ratio:.{decimals}f}"
            if self.met(float(text)) == self.met(ratio) and float(text) != self.bound:
                break
        return text if ratio != self.bound else f"{ratio:.{few}f}"

    def verdict(self, ratio: float) -> str:
        """What was wanted, and whether it was reached."""
        return f"goal {self}: {'met' if self.met(ratio) else 'missed'}"

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


def at_least(bound: float) -> Goal:
    """For what must grow, or hardly shrink."""
    return Goal(">=", bound)


def at_most(bound: float) -> Goal:
    """For what must shrink, or hardly grow."""
    return Goal("<=", bound)


class Row(NamedTuple):
    """A line of the goals."""

    name: str
    figure: Figure
    goals: dict[str, Goal]
    """By baseline."""


CHATS = {"budget_gb": 2, "working_set": 6, "images_a_user": 1}
ROWS = (
    Row(
        "requests resident at 5 GB, 128 outputs",
        figure("resident", "requests", budget_gb=5, outputs=128),
        {STOCK: at_least(8), EIGHT_BITS: at_least(4)},
    ),
    Row(
        "requests resident at 5 GB, 300 outputs",
        figure("resident", "requests", budget_gb=5, outputs=300),
        {STOCK: at_least(6), EIGHT_BITS: at_least(3)},
    ),
    Row(
        "decode tokens/s, 300 outputs, 2 GB",
        figure("decode", "decode_tokens_per_s", budget_gb=2, outputs=300),
        {STOCK: at_least(5), EIGHT_BITS: at_least(2.7)},
    ),
    Row(
        "decode tokens/s, 300 outputs, 5 GB",
        figure("resident", "decode_tokens_per_s", budget_gb=5, outputs=300),
        {STOCK: at_least(4), EIGHT_BITS: at_least(2.2)},
    ),
    Row(
        "decode tokens/s, 16k visual tokens a request, 20 GB",
        figure("long-context", "decode_tokens_per_s", budget_gb=20),
        {STOCK: at_least(6), EIGHT_BITS: at_least(3.5)},
    ),
    Row(
        "output tokens/s end to end, 1,024 outputs, 5 GB",
        figure("end-to-end", "output_tokens_per_s", budget_gb=5, outputs=1024),
        {STOCK: at_least(1.7), EIGHT_BITS: at_least(1.3)},
    ),
    Row(
        "image chats, working set 6x: turns/s",
        figure("image-chats", "turns_per_s", **CHATS),
        {STOCK: at_least(4), EIGHT_BITS: at_least(3)},
    ),
    Row(
        "image chats, working set 6x: time to first token",
        figure("image-chats", "first_token_ms_median", **CHATS),
        {STOCK: at_most(0.25), EIGHT_BITS: at_most(0.33)},
    ),
    Row(
        "longest video request in the same pool",
        figure("longest-video", "most_visual_tokens", layout="one span"),
        {STOCK: at_least(10), EIGHT_BITS: at_least(5)},
    ),
    Row(
        "text-only throughput, fixed lengths",
        figure("no-harm", "output_tokens_per_s_median", what="text, fixed lengths"),
        {STOCK: at_least(0.98)},
    ),
    Row(
        "text-only throughput, chat lengths",
        figure("no-harm", "output_tokens_per_s_median", what="text, chat lengths"),
        {STOCK: at_least(0.98)},
    ),
    Row(
        "first token of a lone image request",
        figure("no-harm", "first_token_ms_median", what="lone image request"),
        {STOCK: at_most(1.03)},
    ),
    Row(
        "decode step at batch 1, image request",
        figure("no-harm", "step_ms_median", what="lone image request"),
        {STOCK: at_most(1.03)},
    ),
    Row(
        "decode step at batch 1, text request",
        figure("no-harm", "step_ms_median", what="lone text request"),
        {STOCK: at_most(1.03)},
    ),
    Row(
        "text-only throughput over HTTP, fixed lengths",
        figure("http", "output_tokens_per_s", what="text, fixed lengths"),
        {STOCK: at_least(0.98)},
    ),
    Row(
        "text-only throughput over HTTP, chat lengths",
        figure("http", "output_tokens_per_s", what="text, chat lengths"),
        {STOCK: at_least(0.98)},
    ),
    Row(
        "text-only throughput over HTTP, 16 requests at a time",
        figure("http", "output_tokens_per_s", what="text, few at a time"),
        {STOCK: at_least(0.98)},
    ),
    Row(
        "first token of a lone image request over HTTP",
        figure("http", "first_token_ms_median", what="lone image request"),
        {STOCK: at_most(1.03)},
    ),
)


class Ratio(NamedTuple):
    """Two values of one run."""

    run: Run
    ours: float
    baseline: float
    records: tuple[str, ...]
    """That they are from."""

    @property
    def ratio(self) -> float:
        """Ours over the baseline's."""
        return self.ours / self.baseline


def ratio(row: Row, baseline: str, runs: Iterable[Run], dtype: str = OURS) -> Ratio | None:
    """A row's ratio in the newest run that has both sides."""
    for run in runs:
        cells = [row.figure.cell(run, name) for name in (dtype, baseline)]
        ours, theirs = map(row.figure.read, cells)
        if ours is not None and theirs:
            return Ratio(run, ours, theirs, tuple(cell["record"] for cell in cells if cell))
    return None


def of_one_device(runs: list[Run]) -> list[Run]:
    """The runs on the device of the newest one that has the first row of the goals."""
    device = next((run.device for run in runs if ratio(ROWS[0], STOCK, [run])), None)
    return [run for run in runs if device in (None, run.device)]


def crossings(run: Run, baseline: str, name: str, dtype: str = OURS) -> list[float] | None:
    """Visual shares, in percent, where ours becomes better than a baseline's, or worse.

    Parameters
    ----------
    run
        The run.
    baseline
        KV cache dtype to compare with.
    name
        What is compared, as ``requests`` or ``decode_tokens_per_s``.
    dtype
        Ours.

    Returns
    -------
    list[float] | None
        Interpolated between measured shares; None if fewer than two are measured for both.
    """
    points = []
    for cell in run.cells:
        if cell["scenario"] != "mix" or cell["dtype"] != dtype or cell["model"] != MODEL:
            continue
        share = cell.get("visual_share")
        other = run.find("mix", baseline, visual_share=share)
        if other and cell.get(name) and other.get(name):
            points.append((share, cell[name] / other[name] - 1))
    points = sorted(dict(points).items())
    if len(points) < 2:
        return None
    found = []
    for (x, a), (y, b) in pairwise(points):
        if a == 0 or a * b < 0:
            found.append(x if a == 0 else x + (y - x) * a / (a - b))
    return found


def summary_lines(runs: list[Run], dtype: str = OURS) -> list[str]:
    """A line for each row of the goals, all of one device."""
    runs = of_one_device(runs)
    lines = []
    for row in ROWS:
        parts = []
        for baseline, goal in row.goals.items():
            found = ratio(row, baseline, runs, dtype)
            if found:
                said = f"{goal.spell(found.ratio)}x ({goal.verdict(found.ratio)})"
            else:
                said = f"{NOT_MEASURED} (goal {goal})"
            parts.append(f"against {baseline} {said}")
        lines.append(f"{row.name}: {', '.join(parts)}")
    for name, label in (("requests", "requests"), ("decode_tokens_per_s", "decode tokens/s")):
        for baseline in (EIGHT_BITS, "int4_per_token_head"):
            run = next((r for r in runs if crossings(r, baseline, name, dtype) is not None), None)
            found_at = crossings(run, baseline, name, dtype) if run else None
            if found_at is None:
                said = NOT_MEASURED
            else:
                said = ", ".join(f"{x:.0f} %" for x in found_at) or "none"
            lines.append(f"visual share where {label} cross {baseline}: {said}")
    return lines


def print_summary() -> None:
    """Print the ratios of the newest runs."""
    print("\n".join(summary_lines(load_runs())))
