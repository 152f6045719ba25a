"""Merge partial attention results by log-sum-exp in float32, and write the final output.

``out = sum_i w_i out_i / sum_i w_i`` with ``w_i = exp(lse_i - max lse)``.  One kernel merges the
splits of a decode step with the text part; another merges up to three parts of a prefill step.

A split of :mod:`csrc_triton.profile_gluon` has a number for each plane of V, which add up to
those of components here, ``PLANES`` of them before one for the offset of each component.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .launch import launch
from .tables import next_power_of_2


def merged_heads(num_heads: int) -> int:
    """Heads of a program, where many merge few parts each: what a program does once counts."""
    return gcd(num_heads, 4)


@triton.jit
def components(
    wide, p_plane, o_d, D: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Numbers [1, BD] of components o_d from those of V planes and, behind them, of offsets."""
    tl.static_assert(wide.shape[0] == 1)
    BP: tl.constexpr = wide.shape[1]
    wide = wide.reshape([BP])
    out = tl.gather(wide, tl.minimum(PLANES + o_d, BP - 1), 0)
    for b in tl.static_range(BITS):
        plane = tl.load(p_plane + b * D + o_d, mask=o_d < D, other=-1)
        x = tl.gather(wide, tl.maximum(plane, 0), 0)
        out += tl.where(plane >= 0, x, 0.0) * (1 << b)
    return out[None, :]


@triton.jit
def without_keys(lse):
    """Log-sum-exps with -inf for FlashAttention's +inf: no keys, and the output may be anything."""
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def text_part(
    p_row, stride_head, p_lse, stride_lse, o_h, o_d, D: tl.constexpr, HAS_TEXT: tl.constexpr
):
    """What a merge of heads o_h of a row begins with: the text part, or nothing.

    Returns the largest log-sum-exp and the sum of weights, [heads], and the output [heads, BD].
    """
    top = tl.full([o_h.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([o_h.shape[0]], tl.float32)
    out = tl.zeros([o_h.shape[0], o_d.shape[0]], tl.float32)
    if HAS_TEXT:
        top = without_keys(tl.load(p_lse + o_h * stride_lse))
        m = (o_d < D)[None, :]
        out = tl.load(p_row + o_h[:, None] * stride_head + o_d[None, :], mask=m, other=0)
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        out = tl.where((top > float("-inf"))[:, None], out.to(tl.float32), 0.0)
    return top, total, out


@triton.jit
def add_parts(top, total, out, lse, x):
    """Add parts with log-sum-exps [parts, heads] and outputs x [parts, heads, BP].

    Returns the new state, and the factor that it has scaled the old one by.
    """
    new_top = tl.maximum(top, tl.max(lse, 0))
    safe = tl.where(new_top > float("-inf"), new_top, 0.0)
    old = tl.exp(top - safe)
    weight = tl.exp(lse - safe[None, :])
    out = out * old[:, None] + tl.sum(x * weight[:, :, None], 0)
    return new_top, total * old + tl.sum(weight, 0), out, old


# One compilation for all steps: strides of log-sum-exps are numbers of tokens.
@triton.jit(do_not_specialize=["stride_lh", "stride_eh"])
def _merge_splits_kernel(
    p_part, p_part_lse, p_item_start, first_req,
    p_text, stride_tt, stride_th, p_text_lse, stride_lh,
    p_out, stride_ot, stride_oh, p_lse, stride_eh, p_plane,
    NUM_HEADS: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    HAS_TEXT: tl.constexpr, HAS_LSE: tl.constexpr, BI: tl.constexpr, PDL: tl.constexpr,
    PLANES: tl.constexpr, BITS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A program merges BH heads of a request, BI items at a time."""
    i_row = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    o_p = tl.arange(0, BP)
    # All that does not hang on something else is loaded at once: this launch is mostly waiting.
    begin = tl.load(p_item_start + first_req + i_row)
    end = tl.load(p_item_start + first_req + i_row + 1)
    top, total, out = text_part(
        p_text + i_row.to(tl.int64) * stride_tt, stride_th, p_text_lse + i_row, stride_lh,
        o_h, o_d, D, HAS_TEXT,
    )  # fmt: skip
    wide = out
    if PLANES > 0:
        wide = tl.zeros([BH, BP], tl.float32)
    if PDL:
        gdc_wait()  # only now are the partial results of the launch before this one complete
    for start in range(begin, end, BI):
        o_i = start + tl.arange(0, BI)
        m_item = (o_i < end)[:, None]
        at = o_i[:, None] * NUM_HEADS + o_h[None, :]
        lse = tl.load(p_part_lse + at, mask=m_item, other=float("-inf"))
        m = m_item[:, :, None] & (o_p < PLANES + D)[None, None, :]
        x = tl.load(p_part + at[:, :, None] * (PLANES + D) + o_p[None, None, :], mask=m, other=0)
        top, total, wide, old = add_parts(top, total, wide, lse, x)
        if PLANES > 0:
            out *= old[:, None]
    if PLANES > 0:
        out += components(wide, p_plane, o_d, D, PLANES, BITS)
    else:
        out = wide
    safe = tl.where(total > 0, total, 1.0)
    p_row = p_out + i_row.to(tl.int64) * stride_ot + o_h[:, None] * stride_oh
    out = (out / safe[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_row + o_d[None, :], out, mask=(o_d < D)[None, :])
    if HAS_LSE:
        lse = tl.where(total > 0, top + tl.log(safe), float("-inf"))
        tl.store(p_lse + o_h * stride_eh + i_row, lse)


@triton.jit
def weighted(x, weight):
    """Output [heads, BD] times its weights; without keys it may hold anything, NaN included."""
    weight = weight[:, None]
    return tl.where(weight > 0, x.to(tl.float32) * weight, 0.0)


# Log-sum-exps may begin at any row of a batch.
@triton.jit(
    do_not_specialize=["stride_al", "stride_bl", "stride_cl"],
    do_not_specialize_on_alignment=["p_a_lse", "p_b_lse", "p_c_lse"],
)
def _merge_parts_kernel(
    p_a, stride_at, stride_ah, p_a_lse, stride_al,
    p_b, stride_bt, stride_bh, p_b_lse, stride_bl,
    p_c, stride_ct, stride_ch, p_c_lse, stride_cl,
    p_out, stride_ot, stride_oh,
    BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)[None, :]
    m = o_d < D
    lse_a = without_keys(tl.load(p_a_lse + o_h * stride_al + i_row))
    lse_b = without_keys(tl.load(p_b_lse + o_h * stride_bl + i_row))
    lse_c = tl.full([BH], float("-inf"), tl.float32)
    if PARTS == 3:
        lse_c = without_keys(tl.load(p_c_lse + o_h * stride_cl + i_row))
    top = tl.maximum(tl.maximum(lse_a, lse_b), lse_c)
    top = tl.where(top == float("-inf"), 0.0, top)
    w_a, w_b, w_c = tl.exp(lse_a - top), tl.exp(lse_b - top), tl.exp(lse_c - top)
    total = w_a + w_b + w_c
    o_h = o_h[:, None]
    a = tl.load(p_a + i_row * stride_at + o_h * stride_ah + o_d, mask=m, other=0)
    b = tl.load(p_b + i_row * stride_bt + o_h * stride_bh + o_d, mask=m, other=0)
    acc = weighted(a, w_a) + weighted(b, w_b)
    if PARTS == 3:
        c = tl.load(p_c + i_row * stride_ct + o_h * stride_ch + o_d, mask=m, other=0)
        acc += weighted(c, w_c)
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    p_row = p_out + i_row * stride_ot + o_h * stride_oh
    tl.store(p_row + o_d, acc.to(p_out.dtype.element_ty), mask=m)


def merge_parts(
    out: torch.Tensor,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Merge two or three partial results of the same rows.

    Parameters
    ----------
    out
        ``[rows, Hq, D]``, written; may be one of the parts.
    parts
        Pairs of a partial output ``[rows, Hq, D]`` and its log-sum-exp, float32 ``[Hq, rows]``,
        natural logarithm.  An lse of -inf or +inf (FlashAttention's sign for "no keys") means that
        the part has no keys, and its output is not looked at.

    Raises
    ------
    ValueError
        If there are not two or three parts.
    """
    if len(parts) not in (2, 3):
        raise ValueError(f"can merge 2 or 3 parts, got {len(parts)}")
    rows, heads, d = out.shape
    if rows == 0:
        return
    args: list = []
    for x, lse in [*parts, parts[0]][:3]:
        args += [x, x.stride(0), x.stride(1), lse, lse.stride(0)]
    together = merged_heads(heads)
    launch(
        _merge_parts_kernel, (rows, heads // together),
        *args, out, out.stride(0), out.stride(1),
        BH=together, D=d, BD=next_power_of_2(d), PARTS=len(parts), num_warps=1,
    )  # fmt: skip


def naive_merge(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of the merge kernels in float64: output ``[rows, Hq, D]`` and lse ``[Hq, rows]``."""
    lses = torch.stack([lse.double() for _, lse in parts])
    lses = torch.where(lses == float("inf"), float("-inf"), lses)
    total = lses.logsumexp(0)
    weights = (lses - torch.where(total.isinf(), 0, total)).exp().transpose(1, 2)[..., None]
    outs = torch.stack([x.double() for x, _ in parts])
    return torch.where(weights > 0, outs * weights, 0).sum(0), total
