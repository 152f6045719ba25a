"""Kernels against their twins on CPU tensors, under Triton's interpreter and that for Gluon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(p.name for p in (HERE / "interpreted").glob("test_*.py"))


def test_files_exist() -> None:
    assert len(FILES) >= 4


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, str(HERE / "interpreted" / name)],
        env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
