r"""Second moments of a layer, and the basis and bits that follow from them.

An error :math:`\delta k_t` of a visual key moves the score of a query by :math:`q \cdot \delta k_t`
and with it the layer's output by :math:`p_t (q \cdot \delta k_t) W_O (v_t - o)` to first order,
where :math:`o` is the output of the head.  With

    w = p_t^2 |W_O (v_t - o)|^2 / D

the expected damage of a key's error is :math:`\sum w (q \cdot \delta k_t)^2`.  Taken as if queries
and errors were independent, that is the trace of A E, with A = sum of w q q' and E the covariance
of errors.  For values it is exact: the sum of p_t^2 |W_O \delta v_t|^2, with A = sum of
p_t^2 W_O' W_O.  Errors of a code are proportional to the spread of what is coded, so the spread
that counts is the *weighted* covariance C: that of tokens which are attended to.

In the basis of the eigenvectors of A^1/2 C A^1/2 damage is a sum over components, eigenvalue times
the relative error of the component's width, and greedy reverse water-filling places the bits.  Both
parts and all heads have one unit, so they also share planes by it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch


@dataclass
class Moments:
    """Sums over prompts for the KV heads of one layer, float64."""

    query: torch.Tensor
    """``[Hkv, D, D]``: A of keys."""
    key: torch.Tensor
    """``[Hkv, D, D]``: C of keys, times their weight."""
    output: torch.Tensor
    """``[Hkv, D, D]``: A of values."""
    value: torch.Tensor
    """``[Hkv, D, D]``: C of values, times their weight."""
    key_sum: torch.Tensor
    """``[Hkv, D]`` over visual tokens."""
    value_sum: torch.Tensor
    weights: torch.Tensor
    """``[3, Hkv]``: weight of C of keys, of C of values, and visual tokens."""

    @classmethod
    def zeros(cls, num_kv_heads: int, head_size: int, device: torch.device) -> Moments:
        """Nothing seen yet."""
        square, row = (num_kv_heads, head_size, head_size), (num_kv_heads, head_size)
        shapes = (square, square, square, square, row, row, (3, num_kv_heads))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def cpu(self) -> Moments:
        """The same on the host."""
        return Moments(*(getattr(self, f.name).cpu() for f in fields(self)))

    def __add__(self, other: Moments) -> Moments:
        """Over the prompts of both."""
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        output_weight: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Take in one prompt.

        Parameters
        ----------
        query
            ``[T, Hq, D]``: the last T tokens, which read codes.
        key, value
            ``[n, Hkv, D]``: all tokens, the last T among them.
        pages
            int64 ``[n]``: visual page of each token, -1 for text; the last T are text.
        output_weight
            ``[Hq, C, D]``: columns of the output projection for each query head; the identity if
            None.
        scale
            Factor on scores.
        """
        t, heads, d = query.shape
        n, kv_heads, _ = key.shape
        group = heads // kv_heads
        visual = pages >= 0
        future = (
            torch.arange(n, device=key.device) > torch.arange(n - t, n, device=key.device)[:, None]
        )
        for h in range(kv_heads):
            k, v = key[:, h].float(), value[:, h].float()
            coded_k = _off_page_means(k[visual], pages[visual])
            coded_v = _off_page_means(v[visual], pages[visual])
            for g in range(h * group, (h + 1) * group):
                q = query[:, g].float()
                p = (q @ k.T * scale).masked_fill(future, float("-inf")).softmax(-1)
                out, p2 = p @ v, p[:, visual].square()
                if output_weight is None:
                    metric = torch.eye(d, device=key.device)
                else:
                    metric = output_weight[g].float().T @ output_weight[g].float()
                seen = v[visual]
                distance = (seen @ metric * seen).sum(-1) - 2 * (out @ metric) @ seen.T
                distance += (out @ metric * out).sum(-1)[:, None]
                w = (p2 * distance.clamp(min=0)) * scale**2  # [T, visual tokens]
                self.query[h] += (q.T * w.sum(1)) @ q
                self.key[h] += (coded_k.T * w.sum(0)) @ coded_k
                self.output[h] += metric * p2.sum()
                self.value[h] += (coded_v.T * p2.sum(0)) @ coded_v
                self.weights[0, h] += w.sum()
                self.weights[1, h] += p2.sum()
            self.key_sum[h] += k[visual].sum(0)
            self.value_sum[h] += v[visual].sum(0)
            self.weights[2, h] += visual.sum()

    def part(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A and C ``[Hkv, D, D]`` and the mean ``[Hkv, D]`` of ``"key"`` or ``"value"``."""
        tiny = torch.finfo(torch.float64).tiny
        metric, spread, total, weight = (
            (self.query, self.key, self.key_sum, self.weights[0])
            if name == "key"
            else (self.output, self.value, self.value_sum, self.weights[1])
        )
        covariance = spread / weight.clamp(min=tiny)[:, None, None]
        return metric, covariance, total / self.weights[2].clamp(min=1)[:, None]


def _off_page_means(x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """What is left of tokens ``[n, D]`` when the mean of their page is taken off."""
    index = torch.unique(pages, return_inverse=True)[1]
    count = torch.bincount(index).to(x.dtype)
    sums = x.new_zeros(len(count), x.shape[1]).index_add_(0, index, x)
    return x - (sums / count[:, None])[index]


def learn_basis(
    metric: torch.Tensor, covariance: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Basis of one head, and what each component is worth.

    Parameters
    ----------
    metric, covariance
        A and C, float64 ``[D, D]``.
    damping
        Multiple of A's mean eigenvalue that is added to A, because A comes from few prompts.

    Returns
    -------
    basis : torch.Tensor
        ``[D, D]``: T, rows of unit length, most valuable first.
    worth : torch.Tensor
        ``[D]``: damage if the component were lost, falling.
    """
    d = len(metric)
    mean = (metric.trace() / d).clamp(min=torch.finfo(torch.float64).tiny)
    values, vectors = torch.linalg.eigh(metric + damping * mean * torch.eye(d).to(metric))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    worth, turn = torch.linalg.eigh(root @ covariance @ root)
    basis = turn.T.flip(0) @ root
    return basis / basis.norm(dim=1, keepdim=True), worth.flip(0).clamp(min=0)


def place_bits(
    worth: Sequence[float], planes: int, error: Sequence[float]
) -> tuple[tuple[int, ...], float]:
    """Greedy reverse water-filling: each plane goes where it takes off most damage.

    Parameters
    ----------
    worth
        Damage of each component if it were lost.
    planes
        Bits to place.
    error
        Relative squared error of a component with 0, 1, 2 ... bits; its length bounds the bits.

    Returns
    -------
    bits : tuple of int
        Of each component.
    damage : float
        What is left.
    """
    bits = [0] * len(worth)
    gains = [(-w * (error[0] - error[1]), j) for j, w in enumerate(worth)]
    heapq.heapify(gains)
    for _ in range(planes):
        if not gains:
            break
        _, j = heapq.heappop(gains)
        bits[j] += 1
        if bits[j] + 1 < len(error):
            gain = worth[j] * (error[bits[j]] - error[bits[j] + 1])
            heapq.heappush(gains, (-gain, j))
    return tuple(bits), sum(w * error[b] for w, b in zip(worth, bits, strict=True))
