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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import launch
from .tables import next_power_of_2


@triton.jit
def load_planes(p_plane, o_d, D: tl.constexpr, BITS: tl.constexpr):
    """V planes of the bits of components o_d, -1 for none; a merge asks for them at once."""
    planes = ()
    for b in tl.static_range(BITS):
        planes = planes + (tl.load(p_plane + b * D + o_d, mask=o_d < D, other=-1),)
    return planes


@triton.jit
def _combine_planes(wide, planes, o_d, PLANES: tl.constexpr):
    """Numbers of components o_d from [BP] of V planes and, behind them, of offsets."""
    out = tl.gather(wide, tl.minimum(PLANES + o_d, wide.shape[0] - 1), 0)
    for b in tl.static_range(len(planes)):
        x = tl.gather(wide, tl.maximum(planes[b], 0), 0)
        out += tl.where(planes[b] >= 0, x, 0.0) * (1 << b)
    return out


def merged_heads(num_heads: int) -> int:
    """Heads of a program, where many merge few parts each: what a program does once counts."""
    return gcd(num_heads, 4)


@triton.jit
def as_no_keys(lse):
    """FlashAttention gives +inf for a row without keys, whose output may be anything: -inf."""
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def begin_merge(p_lse, p_text, m_d, HAS_TEXT: tl.constexpr, BP: tl.constexpr):
    """What a merge begins with: the text part at p_text [heads, BD] and p_lse [heads], or nothing.

    Returns the largest log-sum-exp and the sum of weights, [heads], the weighted sum of outputs,
    [heads, BD], and that of the numbers of parts, [heads, BP].
    """
    BH: tl.constexpr = p_text.shape[0]
    m_h = tl.full([BH], float("-inf"), tl.float32)
    l_h = tl.zeros([BH], tl.float32)
    out = tl.zeros([BH, p_text.shape[1]], tl.float32)
    wide = tl.zeros([BH, BP], tl.float32)
    if HAS_TEXT:
        m_h = as_no_keys(tl.load(p_lse))
        text = tl.load(p_text, mask=m_d, other=0)
        has_keys = m_h > float("-inf")
        l_h = tl.where(has_keys, 1.0, 0.0)
        out = tl.where(has_keys[:, None], text.to(tl.float32), 0.0)
    return m_h, l_h, out, wide


@triton.jit
def add_parts(m_h, l_h, out, wide, lse, x):
    """Add parts with log-sum-exps [parts, heads] and numbers [parts, heads, BP]."""
    m_new = tl.maximum(m_h, tl.max(lse, 0))
    m_safe = tl.where(m_new > float("-inf"), m_new, 0.0)
    old = tl.exp(m_h - m_safe)
    new = tl.exp(lse - m_safe[None, :])
    out *= old[:, None]
    wide = wide * old[:, None] + tl.sum(x * new[:, :, None], 0)
    l_h = l_h * old + tl.sum(new, 0)
    return m_new, l_h, out, wide


@triton.jit
def end_merge(m_h, l_h, out, wide, planes, o_d, PLANES: tl.constexpr):
    """Output [heads, BD] and its log-sum-exp [heads], -inf without keys."""
    if PLANES > 0:
        tl.static_assert(wide.shape[0] == 1)
        out += _combine_planes(wide.reshape([wide.shape[1]]), planes, o_d, PLANES)[None, :]
    else:
        out += wide
    safe = tl.where(l_h > 0, l_h, 1.0)
    return out / safe[:, None], tl.where(l_h > 0, m_h + tl.log(safe), float("-inf"))


# One compilation for all steps: strides of log-sum-exps are numbers of tokens.
@triton.jit(do_not_specialize=["stride_lh", "stride_eh"])
def _merge_splits_kernel(
    p_part, p_part_lse, p_item_start, first_req,
    p_text, stride_tt, stride_th, p_text_lse, stride_lh,
    p_out, stride_ot, stride_oh, p_lse, stride_eh, p_plane,
    NUM_HEADS: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    HAS_TEXT: tl.constexpr, HAS_LSE: tl.constexpr, BI: tl.constexpr, PDL: tl.constexpr,
    TURNED: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A program merges BH heads of a request, BI items at a time.

    TURNED says that csrc_triton.basis.merge_turned comes next.
    """
    if PDL and TURNED:
        gdc_launch_dependents()  # it waits for this one's results itself
    i_row = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    # All that does not hang on something else is loaded at once: this launch is mostly waiting.
    begin = tl.load(p_item_start + first_req + i_row)
    end = tl.load(p_item_start + first_req + i_row + 1)
    planes = load_planes(p_plane, o_d, D, BITS)
    o_p = tl.arange(0, BP)
    p_text += i_row.to(tl.int64) * stride_tt
    m_h, l_h, out, wide = begin_merge(
        p_text_lse + o_h * stride_lh + i_row,
        p_text + o_h[:, None] * stride_th + o_d[None, :],
        m_d, HAS_TEXT, BP,
    )  # fmt: skip
    if PDL:
        gdc_wait()  # only now are the partial results of the launch before this one complete
    for start in range(begin, end, BI):
        o_i = start + tl.arange(0, BI)
        m_item = (o_i < end)[:, None]
        at = o_i[:, None] * NUM_HEADS + o_h[None, :]
        lse = tl.load(p_part_lse + at, mask=m_item, other=float("-inf"))
        m = m_item[:, :, None] & (o_p < PLANES + D)[None, None, :]
        x = tl.load(p_part + at[:, :, None] * (PLANES + D) + o_p[None, None, :], mask=m, other=0)
        m_h, l_h, out, wide = add_parts(m_h, l_h, out, wide, lse, x)
    out, lse = end_merge(m_h, l_h, out, wide, planes, o_d, PLANES)
    p_row = p_out + i_row.to(tl.int64) * stride_ot + o_h[:, None] * stride_oh
    tl.store(p_row + o_d[None, :], out.to(p_out.dtype.element_ty), mask=m_d)
    if HAS_LSE:
        tl.store(p_lse + o_h * stride_eh + i_row, lse)


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
    D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    lse_a = tl.load(p_a_lse + i_head * stride_al + i_row)
    lse_b = tl.load(p_b_lse + i_head * stride_bl + i_row)
    lse_c = lse_a
    if PARTS == 3:
        lse_c = tl.load(p_c_lse + i_head * stride_cl + i_row)
    else:
        lse_c = tl.full([], float("-inf"), tl.float32)
    lse_a, lse_b, lse_c = as_no_keys(lse_a), as_no_keys(lse_b), as_no_keys(lse_c)
    top = tl.maximum(tl.maximum(lse_a, lse_b), lse_c)
    top = tl.where(top == float("-inf"), 0.0, top)
    w_a = tl.exp(lse_a - top)
    w_b = tl.exp(lse_b - top)
    w_c = tl.exp(lse_c - top)
    a = tl.load(p_a + i_row * stride_at + i_head * stride_ah + o_d, mask=m_d, other=0)
    b = tl.load(p_b + i_row * stride_bt + i_head * stride_bh + o_d, mask=m_d, other=0)
    # A part without keys may hold anything, NaN included.
    acc = tl.where(w_a > 0, a.to(tl.float32) * w_a, 0.0) + tl.where(
        w_b > 0, b.to(tl.float32) * w_b, 0.0
    )
    if PARTS == 3:
        c = tl.load(p_c + i_row * stride_ct + i_head * stride_ch + o_d, mask=m_d, other=0)
        acc += tl.where(w_c > 0, c.to(tl.float32) * w_c, 0.0)
    total = w_a + w_b + w_c
    acc = acc / tl.where(total > 0, total, 1.0)
    p_row = p_out + i_row * stride_ot + i_head * stride_oh
    tl.store(p_row + o_d, acc.to(p_out.dtype.element_ty), mask=m_d)


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
    launch(
        _merge_parts_kernel, (rows, heads),
        *args, out, out.stride(0), out.stride(1),
        D=d, BD=next_power_of_2(d), PARTS=len(parts), num_warps=1,
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
