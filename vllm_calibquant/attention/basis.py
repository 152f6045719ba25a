"""The small products that a profile's basis costs: on what is stored, on queries, on outputs.

Keys and values are coded as ``y = T (x - mean)`` (:mod:`vllm_calibquant.profile`).  A *linear* map
moves to the other side of a product, as scales do in post-scaling, so pages and kernels see ``y``
alone:

* scores: ``q . k = (T_K^-T q) . y_K + q . mean_K``,
* output: ``sum_t p_t v_t = T_V^-1 sum_t p_t y_t + mean_V sum_t p_t``.

The second term of a score is the same for all visual tokens.  It commutes with the calibration of
scores and so may be added to the log-sum-exp of the visual part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_calibquant.profile import LayerProfile, PartProfile
from vllm_calibquant.threads import one_thread


@dataclass(frozen=True, eq=False)
class PartBasis:
    """Basis of K or of V of the KV heads of one layer, on their device."""

    forward: torch.Tensor
    """``[Hkv, D, D]`` in the model's dtype: transposed T."""
    shift: torch.Tensor
    """``[Hkv, 1, D]`` in the model's dtype: T mean."""
    inverse: torch.Tensor
    """float32 ``[Hkv, D, D]``: transposed inverse of T *as rounded* to the model's dtype."""
    mean: torch.Tensor
    """float32 ``[Hkv, D]``: the mean that the rounded shift takes off."""

    @classmethod
    @one_thread()
    def of(
        cls, part: PartProfile, heads: slice, dtype: torch.dtype, device: torch.device | str
    ) -> PartBasis:
        """Basis of the KV heads of this rank."""
        basis = part.basis[heads].to(dtype)
        exact = basis.double()
        shift = torch.einsum("hed,hd->he", exact, part.mean[heads].double()).to(dtype)
        inverse = torch.linalg.inv(exact)
        mean = torch.einsum("hde,he->hd", inverse, shift.double())
        return cls(
            forward=basis.mT.contiguous().to(device),
            shift=shift[:, None].to(device),
            inverse=inverse.mT.float().contiguous().to(device),
            mean=mean.float().to(device),
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """What is coded of K or V ``[T, Hkv, D]``: ``T (x - mean)``, same shape and dtype."""
        return torch.baddbmm(-self.shift, x.transpose(0, 1), self.forward).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Basis:
    """Bases of a layer."""

    key: PartBasis
    value: PartBasis

    @classmethod
    def of(
        cls, layer: LayerProfile, heads: slice, dtype: torch.dtype, device: torch.device | str
    ) -> Basis:
        """Bases of the KV heads ``heads`` of a layer."""
        return cls(*(PartBasis.of(part, heads, dtype, device) for part in (layer.key, layer.value)))

    @classmethod
    @lru_cache
    def hadamard(
        cls, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> Basis:
        """The Walsh-Hadamard transform of K and V, the same in all heads; layers share it."""
        basis = hadamard(head_size).expand(num_kv_heads, -1, -1)
        mean, bits = torch.zeros(num_kv_heads, head_size), (1,) * head_size
        part = PartProfile(basis, mean, bits, torch.ones(head_size))
        both = PartBasis.of(part, slice(None), dtype, device)
        return cls(both, both)

    def query(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries for coded keys.

        Parameters
        ----------
        query
            ``[T, Hq, D]``; query heads of a KV head are neighbours.

        Returns
        -------
        query : torch.Tensor
            ``[T, Hq, D]`` in the same dtype: ``T_K^-T q``.
        shift : torch.Tensor
            float32 ``[T, Hq]``: ``q . mean_K``, what every visual score lacks (before 1/sqrt(D)).
        """
        q = _by_kv_head(query, len(self.key.mean))
        # K = T^-1 y, so q K = (q T^-1) y: row vectors times T^-1, which is `inverse` transposed.
        turned = torch.bmm(q, self.key.inverse.mT)
        shift = torch.bmm(q, self.key.mean[..., None])
        return _by_query_head(turned, query).to(query.dtype), _by_query_head(shift, query)[..., 0]

    def output(self, output: torch.Tensor) -> torch.Tensor:
        """Outputs from sums of coded values.

        Parameters
        ----------
        output
            ``[T, Hq, D]``: ``sum_t p_t y_t`` of visual tokens whose ``p_t`` add up to 1.

        Returns
        -------
        torch.Tensor
            ``[T, Hq, D]`` in the same dtype: ``T_V^-1 output + mean_V``.
        """
        y = _by_kv_head(output, len(self.value.mean))
        turned = torch.baddbmm(self.value.mean[:, None], y, self.value.inverse)
        return _by_query_head(turned, output).to(output.dtype)


def hadamard(size: int) -> torch.Tensor:
    """The Walsh-Hadamard matrix over the square root of its size, float32 ``[size, size]``.

    Sylvester's, which is symmetric and its own inverse, and exists for powers of two.  Of other
    sizes it has as many such blocks on its diagonal as make them whole, as large as they can be.
    """
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block] * (size // len(block))) / len(block) ** 0.5


def _by_kv_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[T, Hq, D]`` as float32 ``[Hkv, T * G, D]``."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2).float()


def _by_query_head(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`_by_kv_head`."""
    return x.unflatten(1, (like.shape[0], -1)).transpose(0, 1).flatten(1, 2)
