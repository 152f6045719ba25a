"""Unpack the tiny model into an ordinary Hugging Face directory.

``python -m tests.tinyvlm.unpack OUT``, or `model_path` for a copy that is unpacked once and kept.
"""

import argparse
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from .world import ASSETS

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights.safetensors.xz"
CACHE = HERE.parents[1] / ".cache"


def unpack_model(out):
    """Write configuration, tokenizer and bfloat16 weights into the directory `out`."""
    from safetensors.torch import save_file

    from .packed import unpack

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for file in [*(HERE / "model").iterdir(), ASSETS / "tokenizer.json"]:
        shutil.copyfile(file, out / file.name)
    save_file(unpack(WEIGHTS.read_bytes()), out / "model.safetensors", {"format": "pt"})


def model_path():
    """Return the path of the model, unpacked below ``.cache/`` by the first call.

    Where the repository is read-only, a temporary directory takes the place of ``.cache/``.
    Processes that start together may all call this: the directory appears whole or not at all.
    """
    digest = hashlib.sha256()
    for file in [*sorted((HERE / "model").iterdir()), ASSETS / "tokenizer.json", WEIGHTS]:
        digest.update(file.read_bytes())
    cache = CACHE if os.access(CACHE.parent, os.W_OK) else Path(tempfile.gettempdir())
    target = cache / f"tinyvlm-{digest.hexdigest()[:12]}"
    if not target.is_dir():
        cache.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".tinyvlm-") as scratch:
            unpack_model(Path(scratch, target.name))
            try:
                Path(scratch, target.name).rename(target)
            except OSError:  # another process was faster
                if not target.is_dir():
                    raise
    return target


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    unpack_model(parser.parse_args().out)


if __name__ == "__main__":
    main()
