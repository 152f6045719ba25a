"""The weights as they lie in the repository: 8 bits a number, entropy-coded.

Matrices are int8 codes with one float32 scale per output row (tensors ``NAME`` and ``NAME.scale``
of a safetensors file), vectors stay bfloat16; the file is compressed with xz.
"""

import lzma

import torch
from safetensors.torch import load, save

SCALE = ".scale"
# Codes up to 127 would fit; fewer levels compress better (13.6 MB at 88, 14.5 MB at 127).
LARGEST_CODE = 88
# Codes are noise to a match finder: what xz gives is the entropy of single bytes, which is best
# without contexts (lc = lp = pb = 0) and fastest with the shallowest search.
FILTERS = [
    {
        "id": lzma.FILTER_LZMA2, "dict_size": 4096, "lc": 0, "lp": 0, "pb": 0,
        "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 8, "depth": 1,
    }
]  # fmt: skip


def pack(state):
    """Pack a state dict with the names of LLaVA's files into bytes."""
    tensors = {}
    for name, weight in state.items():
        if weight.ndim < 2:
            tensors[name] = weight.bfloat16()
            continue
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(1).clamp(min=1e-12) / LARGEST_CODE
        codes = (rows / scale[:, None]).round().to(torch.int8)
        tensors[name] = codes.view(weight.shape)
        tensors[name + SCALE] = scale
    return lzma.compress(save(tensors), filters=FILTERS)


def unpack(data):
    """Return the bfloat16 state dict that `pack` was given, to 8 bits."""
    tensors = load(lzma.decompress(data))
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == torch.int8:
            scale = tensors[name + SCALE].view(-1, *[1] * (tensor.ndim - 1))
            tensor = (tensor * scale).bfloat16()
        state[name] = tensor
    return state
