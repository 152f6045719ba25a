"""Training checkpoints: in two files, of which each stays below 16 MiB, and packed at the end."""

import json
import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from .export import hub_name, hub_state
from .packed import pack, unpack
from .unpack import WEIGHTS

POSITIONS = "tower.position_embedding.weight"


def load_checkpoint(model, source):
    """Load a folder's checkpoint, or with "packed" the repository's weights, into a TinyVLM.

    Positions of another image size are interpolated; auxiliary heads that the source lacks stay as
    they are.
    """
    if source == "packed":
        hub = unpack(WEIGHTS.read_bytes())
        state = {k: hub[hub_name(k)] for k in model.state_dict() if not k.startswith("aux")}
    else:
        state = read_checkpoint(source)
    state = {name: tensor.float() for name, tensor in state.items()}
    state[POSITIONS] = resized(state[POSITIONS], len(model.state_dict()[POSITIONS]))
    missing, unexpected = model.load_state_dict(state, strict=False)
    lacking = [name for name in missing if not name.startswith("aux")]
    if lacking or unexpected:
        raise ValueError(f"{source} lacks {lacking} and has {unexpected}")


def resized(positions, count):
    """Interpolate a square of positions to another number of patches: [n, width] each."""
    old, new = (round(n**0.5) for n in (len(positions), count))
    if old == new:
        return positions
    square = positions.T.reshape(1, -1, old, old)
    square = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    return square[0].flatten(1).T.contiguous()


def read_checkpoint(folder):
    """Return the state dict of a folder's checkpoint."""
    state = {}
    for file in sorted(Path(folder).glob("checkpoint-*.safetensors")):
        state.update(load_file(file))
    return state


class Writer:
    """Writes checkpoints of a model into a folder, at most one in so many seconds."""

    def __init__(self, folder, every):
        self.folder, self.every = Path(folder), every
        self.last = time.monotonic()

    def save(self, model, now=False):
        """Save the model in bfloat16, if it is time or has to be now."""
        if not now and time.monotonic() - self.last < self.every:
            return
        self.last = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.bfloat16().cpu().contiguous() for k, v in model.state_dict().items()}
        half, taken = sum(v.numel() for v in state.values()) / 2, 0
        parts = {1: {}, 2: {}}
        for name, tensor in state.items():
            parts[1 if taken < half else 2][name] = tensor
            taken += tensor.numel()
        for number, part in parts.items():
            path = self.folder / f"checkpoint-{number}.safetensors"
            save_file(part, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)

    def pack(self, model):
        """Write the weights as the repository holds them."""
        state = {k: v.bfloat16().cpu() for k, v in model.state_dict().items()}
        (self.folder / WEIGHTS.name).write_bytes(pack(hub_state(state)))

    def report(self, report):
        """Write what there is to say of the training."""
        report = json.dumps(report, indent=1, default=str)
        (self.folder / "training.json").write_text(report + "\n", encoding="utf-8")
