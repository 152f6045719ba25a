"""Put a trained checkpoint into the repository: ``python -m tests.tinyvlm.export CHECKPOINT``."""

import argparse
import re
from pathlib import Path

import torch

from .packed import pack
from .unpack import WEIGHTS

# Names in training -> names in LLaVA's files on the hub, which vLLM expects.
RENAMES = {
    r"tower\.layers\.(.+)": r"vision_tower.vision_model.encoder.layers.\1",
    r"tower\.(\w+_embedding\..+)": r"vision_tower.vision_model.embeddings.\1",
    r"(linear_\d\..+)": r"multi_modal_projector.\1",
    r"embed\.weight": r"language_model.model.embed_tokens.weight",
    r"layers\.(\d+)\.([qkvo]_proj\..+)": r"language_model.model.layers.\1.self_attn.\2",
    r"layers\.(\d+)\.((?:gate|up|down)_proj\..+)": r"language_model.model.layers.\1.mlp.\2",
    r"layers\.(\d+)\.(\w+_layernorm)": r"language_model.model.layers.\1.\2.weight",
    r"norm": r"language_model.model.norm.weight",
    r"lm_head\.weight": r"language_model.lm_head.weight",
}


def hub_name(name):
    """Return the name that a parameter of `TinyVLM` has in LLaVA's files."""
    for pattern, replacement in RENAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise KeyError(name)


def hub_state(state):
    """Rename a training state dict, without the auxiliary head."""
    hub = {hub_name(k): v for k, v in state.items() if not k.startswith("aux")}
    # transformers always builds this norm; feature layer -1 is taken before it.
    width = len(hub["multi_modal_projector.linear_1.weight"])
    hub["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(width)
    hub["vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(width)
    return hub


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder")
    args = parser.parse_args()
    from .checkpoint import read_checkpoint

    WEIGHTS.write_bytes(pack(hub_state(read_checkpoint(args.checkpoint))))


if __name__ == "__main__":
    main()
