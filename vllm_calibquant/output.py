"""Where commands write: checked before the hours that the writing comes after."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vllm_calibquant.config import ConfigError


def check_output(path: Path) -> None:
    """Refuse a file of ``--out`` that could not be written.

    Raises
    ------
    ConfigError
        If it is a directory, or its directory is none or cannot be written to.
    """
    if path.is_dir():
        raise ConfigError(f"--out {path} is a directory; give the name of a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: there is no directory {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"--out {path}: {path.parent} cannot be written to ({error})") from None
