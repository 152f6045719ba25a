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

from vllm_calibquant.threads import one_thread


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
        visual: torch.Tensor,
        pages: torch.Tensor,
        output_metric: torch.Tensor,
        scale: float,
    ) -> None:
        """Take in one prompt; nothing here waits for a GPU.

        Parameters
        ----------
        query
            ``[T, Hq, D]``: the last T tokens, which read codes.
        key, value
            ``[n, Hkv, D]``: all tokens, the last T among them.
        visual
            int64 ``[N]``: tokens in pages, before the last T.
        pages
            int64 ``[N]``: a number from 0 to N - 1 for the page of each.
        output_metric
            float32 ``[Hq, D, D]``: W_O' W_O of each query head.
        scale
            Factor on scores.
        """
        n, kv_heads, _ = key.shape
        q = query.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, T, D]
        k, v = key.float().transpose(0, 1), value.float().transpose(0, 1)  # [Hkv, n, D]
        metric = output_metric.unflatten(0, (kv_heads, -1))
        position = torch.arange(n, device=key.device)
        future = position > position[n - len(query) :, None]
        p = (q @ k[:, None].mT * scale).masked_fill(future, float("-inf")).softmax(-1)
        out, p2 = p @ v[:, None], p[..., visual].square()  # [Hkv, G, T, N]
        k, v = k[:, visual], v[:, visual]

        distance = -2 * (out @ metric) @ v[:, None].mT
        distance += ((v[:, None] @ metric) * v[:, None]).sum(-1)[:, :, None]
        distance += ((out @ metric) * out).sum(-1, keepdim=True)
        w = p2 * distance.clamp(min=0) * scale**2
        of_head = p2.sum((2, 3))  # [Hkv, G]

        k_off, v_off = _off_page_means(k, pages), _off_page_means(v, pages)
        self.query += torch.einsum("hgtd,hgt,hgte->hde", q, w.sum(3), q)
        self.key += torch.einsum("hnd,hn,hne->hde", k_off, w.sum((1, 2)), k_off)
        self.output += torch.einsum("hgde,hg->hde", metric, of_head)
        self.value += torch.einsum("hnd,hn,hne->hde", v_off, p2.sum((1, 2)), v_off)
        self.key_sum += k.sum(1)
        self.value_sum += v.sum(1)
        self.weights[0] += w.sum((1, 2, 3))
        self.weights[1] += of_head.sum(1)
        self.weights[2] += len(visual)

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
    """What is left of tokens ``[Hkv, N, D]`` when the mean of their page is taken off."""
    sums = torch.zeros_like(x).index_add_(1, pages, x)
    count = torch.zeros_like(x[0, :, :1]).index_add_(0, pages, torch.ones_like(x[0, :, :1]))
    return x - (sums / count.clamp(min=1))[:, pages]


@one_thread()
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
