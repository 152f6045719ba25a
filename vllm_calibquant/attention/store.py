"""Coding the visual tokens of a step into their pages, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_calibquant.attention.basis import Basis
from vllm_calibquant.config import CalibQuantConfig, RangeScope
from vllm_calibquant.format import PageFormat
from vllm_calibquant.profile import Profile
from vllm_calibquant.quantize import RANGE_ESTIMATORS, MinMax, RangeEstimator, encode
from vllm_calibquant.tags import is_visual, page_of, slot_of


@dataclass(frozen=True)
class Codec:
    """What turns K and V of a page's tokens into the page's bytes."""

    page_format: PageFormat
    key_estimator: RangeEstimator
    value_estimator: RangeEstimator
    basis: Basis | None = None
    """What is coded is K and V in this basis, or as they are."""
    range_scope: RangeScope = "page"
    """Whether each page has ranges of its own, or all pages of a call share theirs."""

    @classmethod
    def of(
        cls,
        config: CalibQuantConfig,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Codec:
        """Codec of a layer."""
        estimator: Callable[..., RangeEstimator] = RANGE_ESTIMATORS[config.estimator]
        extra = {"alpha": config.quantile} if config.estimator == "quantile" else {}
        basis = None
        if config.transform == "hadamard":
            basis = Basis.hadamard(num_kv_heads, head_size, dtype, device)
        return cls(
            PageFormat.uniform(head_size, config.bits, dtype),
            estimator(factor=config.key_factor, **extra),
            estimator(factor=config.value_factor, **extra),
            basis,
            range_scope=config.range_scope,
        )

    @classmethod
    def of_profile(
        cls,
        profile: Profile,
        layer: int,
        heads: slice,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Codec:
        """Codec of the KV heads ``heads`` of a layer that the profile codes."""
        parts = profile.layers[layer]
        return cls(
            profile.page_format(layer, dtype),
            MinMax(parts.key.factors.to(device)),
            MinMax(parts.value.factors.to(device)),
            Basis.of(parts, heads, dtype, device),
        )

    def encode(self, key: torch.Tensor, value: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Pages of the given tokens.

        Parameters
        ----------
        key, value
            ``[P, tokens, Hkv, D]``; pages of one request where ranges are those of a request.
        valid
            bool ``[P, tokens]``, True where a token exists.

        Returns
        -------
        torch.Tensor
            uint8 ``[P, Hkv, head_bytes]``.
        """
        fmt = self.page_format
        request = self.range_scope == "request"
        if request:  # one page of all tokens, as far as ranges are concerned
            key, value, valid = (x.flatten(0, 1)[None] for x in (key, value, valid))
        mask = valid[:, None, :, None]
        parts = []
        for x, bits, estimator in (
            (key, fmt.key_bits, self.key_estimator),
            (value, fmt.value_bits, self.value_estimator),
        ):
            table = torch.tensor(bits, device=x.device)
            parts.append(encode(x.transpose(1, 2).float(), mask, table, estimator, fmt.dtype))
        (k, k_scale, k_offset), (v, v_scale, v_offset) = parts
        ranges = torch.cat([k_scale, k_offset, v_scale, v_offset], -2)
        if request:
            k, v = (codes[0].unflatten(1, (-1, fmt.tokens)).transpose(0, 1) for codes in (k, v))
            ranges = ranges.expand(len(k), -1, -1, -1)
        return fmt.pack(k, v, ranges)


def store_visual(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_bytes: torch.Tensor,
    slot_mapping: torch.Tensor,
    codec: Codec,
) -> None:
    """Write the visual tokens of a step.

    Parameters
    ----------
    key, value
        ``[T, Hkv, D]``, visual tokens only; all tokens of a page are among them.  With ranges of
        a request they are all that the step computes of one request.
    kv_bytes
        uint8 ``[pages, Hkv, head_bytes]``, written in place.
    slot_mapping
        int64 ``[T]`` slots ``tagged id * block_size + offset``.
    codec
        Ranges and layout.
    """
    fmt = codec.page_format
    block = slot_mapping // fmt.block_size
    pages, index = torch.unique(page_of(block), return_inverse=True)
    token = slot_of(block) * fmt.block_size + slot_mapping % fmt.block_size
    shape = (len(pages), fmt.tokens)
    valid = torch.zeros(shape, dtype=torch.bool, device=key.device)
    valid[index, token] = True
    if codec.basis is not None:
        key, value = codec.basis.key.encode(key), codec.basis.value.encode(value)
    k = key.new_zeros(*shape, *key.shape[1:])
    v = value.new_zeros(*shape, *value.shape[1:])
    k[index, token], v[index, token] = key, value
    kv_bytes[pages] = codec.encode(k, v, valid)


def visual_mask(slot_mapping: torch.Tensor, block_size: int) -> torch.Tensor:
    """Which slots lie in visual pages; padding (negative) does not."""
    return is_visual(slot_mapping // block_size)
