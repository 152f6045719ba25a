"""Kernels that keep visual tokens of the KV cache in bit-plane pages and attend to them there.

The steps of a layer, in order (all shapes fixed, nothing synchronises with the host):

1. once a step: :func:`build_tables` turns tagged block ids into :class:`StepTables`;
2. :func:`store` writes the step's K and V, text and visual, in one launch; with a profile's basis
   :func:`encode` comes before it;
3. decode: stock FlashAttention over ``text_block_table`` and ``text_lens`` gives output and
   log-sum-exp of the text part, :func:`decode_attention` adds the visual pages and merges;
4. prefill: FlashAttention over the step's own K and V and over the cached text blocks
   (``context_text_lens``), :func:`prefill_attention` over the visual pages, :func:`merge_parts`;
   if nothing but text is cached, :func:`join_context` and a single call of FlashAttention.

Each file holds one kernel, and beside it the plain-PyTorch twin that it is tested against
(``naive_*``).  The byte layout is defined by :mod:`vllm_calibquant.format`.
"""

from .basis import Turns, encode
from .decode import (
    MAX_GROUP,
    DecodeScratch,
    allocate_scratch,
    decode_attention,
    gluon_serves,
)
from .join import MAX_REQUESTS as MAX_JOINED
from .join import join_context
from .merge import merge_parts
from .metadata import StepTables, allocate_tables, build_tables
from .prefill import prefill_attention
from .store import store
from .tables import MAX_VALUE_PLANES, DeviceFormat, cache_words

__all__ = [
    "MAX_GROUP",
    "MAX_JOINED",
    "MAX_VALUE_PLANES",
    "DecodeScratch",
    "DeviceFormat",
    "StepTables",
    "Turns",
    "allocate_scratch",
    "allocate_tables",
    "build_tables",
    "cache_words",
    "decode_attention",
    "encode",
    "gluon_serves",
    "join_context",
    "merge_parts",
    "prefill_attention",
    "store",
]
