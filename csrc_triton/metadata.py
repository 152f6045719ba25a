"""From tagged block ids to the tables that attention and store read: once a step.

A row of the block table mixes text blocks (the id is the page) and visual blocks (page and
sub-slot).  For each request the kernel writes

* the compact *text block table*, which stock FlashAttention reads, with two lengths: all text
  tokens up to ``seq_len`` (decode: the new token's K and V are in the cache already) and the text
  tokens before this step (prefill: the step's own tokens are attended from the raw K and V);
* the *visual runs* before this step: consecutive sub-slots of one page, as two numbers, the tagged
  id of the first sub-slot and the index of the last sub-slot.

For the store it lists this step's visual pages, the number of tokens that each gets, and the row of
the step's K and V of every one of them.  The program that finishes last shares the visual runs of
the decode requests among the programs of the split decode kernel, as many as the GPU runs at once,
in *half runs* (a run, cut at the middle of its page).  An *item* is what one program has of one
request.  To begin another item costs a program about as much as a page, so where there are programs
enough for some to have a little more than the rest, each has one item, and a request's items are of
equal size; otherwise every program gets as many half runs in a row.

Everything has a fixed grid and stays on the device, so it replays in a CUDA graph.  Rows of the
block table past a request's length hold stale ids; nothing past ``seq_lens`` is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_calibquant.tags import TAG_SHIFT

from .launch import launch
from .tables import BLOCK

TAG = tl.constexpr(TAG_SHIFT)
PAGE_MASK = tl.constexpr((1 << TAG_SHIFT) - 1)
_ONE_SLOT = tl.constexpr(1 << TAG_SHIFT)

PROGRAMS_PER_SM = 12
"""Programs of the decode kernel for each multiprocessor: what its registers hold at once."""


@dataclass
class StepTables:
    """Persistent buffers of one step; see :func:`allocate_tables` and :func:`build_tables`.

    Attributes
    ----------
    text_block_table : torch.Tensor
        int32 ``[max_num_reqs, max_num_blocks]``; entries past the text blocks are stale.
    text_lens : torch.Tensor
        int32 ``[max_num_reqs]``: text tokens of the request up to ``seq_len``.
    context_text_lens : torch.Tensor
        int32 ``[max_num_reqs]``: text tokens before this step.
    runs : torch.Tensor
        int32 ``[max_num_reqs, max_num_blocks, 2]``: tagged id of a run's first sub-slot, index of
        its last sub-slot.
    num_runs, visual_lens : torch.Tensor
        int32 ``[max_num_reqs]``: runs of the request and the visual tokens in them.
    items : torch.Tensor
        int32 ``[max_items, 4]``: request of an item, its first half run, the one after its last,
        and the tagged id of the first.  Half runs ``2 i`` and ``2 i + 1`` are run i of the request
        before and from sub-slot ``half_slots`` of the page on; either may be empty.
    item_start : torch.Tensor
        int32 ``[max_num_reqs + 1]``: items of request r are ``item_start[r] .. item_start[r + 1] -
        1``.
    half_start : torch.Tensor
        int32 ``[max_num_reqs + 1]``: half runs of all requests before r.
    program_item : torch.Tensor
        int32 ``[target_programs + 1]``: items of program p are ``program_item[p] ..
        program_item[p + 1] - 1``.
    plan : torch.Tensor
        int32 ``[6]``: number of programs that have items, most half runs of one, number of this
        step's visual pages, the ticket counter that finds the program that ends last (0 between
        steps), number of items, and number of runs of all decode requests.
    page_ids, page_tokens : torch.Tensor
        int32 ``[max_pages]``: page and number of tokens of each visual page written in this step.
    page_rows : torch.Tensor
        int32 ``[max_pages, slots * 16]``: row in the step's K and V of each token of such a page;
        entries past ``page_tokens`` are stale.
    half_slots : int
        Sub-slots of the first half of a page.
    num_kv_heads : int
        KV heads of this rank.
    target_programs : int
        Programs of the decode kernel, for each KV head.
    num_prefills : int
        Requests of the last :func:`build_tables` that are not decoded.
    """

    text_block_table: torch.Tensor
    text_lens: torch.Tensor
    context_text_lens: torch.Tensor
    runs: torch.Tensor
    num_runs: torch.Tensor
    visual_lens: torch.Tensor
    items: torch.Tensor
    item_start: torch.Tensor
    half_start: torch.Tensor
    program_item: torch.Tensor
    plan: torch.Tensor
    page_ids: torch.Tensor
    page_tokens: torch.Tensor
    page_rows: torch.Tensor
    half_slots: int
    num_kv_heads: int
    target_programs: int
    num_prefills: int = 0

    @property
    def max_items(self) -> int:
        """Items that the buffers hold."""
        return self.items.shape[0]

    def items_for(self, num_requests: int) -> int:
        """Upper bound of the items of ``num_requests`` decode requests."""
        return min(self.max_items, self.target_programs + num_requests)


def allocate_tables(
    *,
    max_num_reqs: int,
    max_num_blocks: int,
    max_num_tokens: int,
    slots: int,
    num_kv_heads: int,
    device: torch.device | str,
    num_sms: int | None = None,
    programs_per_sm: int | None = None,
) -> StepTables:
    """Allocate the buffers of :func:`build_tables`.

    Parameters
    ----------
    max_num_reqs, max_num_tokens
        Most requests and scheduled tokens of a step.
    max_num_blocks
        Columns of the block table: blocks of the longest request.
    slots
        Sub-slots of a visual page (``PageFormat.slots``).
    num_kv_heads
        KV heads of this rank.
    device
        Device of all buffers.
    num_sms
        Multiprocessors of the device; read from it when it is a CUDA device.
    programs_per_sm
        Programs of the decode kernel for each multiprocessor; ``PROGRAMS_PER_SM`` if None.
    """
    if num_sms is None:
        cuda = torch.device(device).type == "cuda"
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    target = max(1, num_sms * (programs_per_sm or PROGRAMS_PER_SM) // num_kv_heads)
    max_pages = max(1, max_num_tokens // (2 * BLOCK))

    def buffer(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return StepTables(
        text_block_table=buffer(max_num_reqs, max_num_blocks),
        text_lens=buffer(max_num_reqs),
        context_text_lens=buffer(max_num_reqs),
        runs=buffer(max_num_reqs, max_num_blocks, 2),
        num_runs=buffer(max_num_reqs),
        visual_lens=buffer(max_num_reqs),
        items=buffer(target + max_num_reqs, 4),
        item_start=buffer(max_num_reqs + 1),
        half_start=buffer(max_num_reqs + 1),
        program_item=buffer(target + 1),
        plan=buffer(6),
        page_ids=buffer(max_pages),
        page_tokens=buffer(max_pages),
        page_rows=buffer(max_pages, slots * BLOCK),
        half_slots=half_slots(slots),
        num_kv_heads=num_kv_heads,
        target_programs=target,
    )


def half_slots(slots: int) -> int:
    """Sub-slots of the first half of a page: of 14 of them 8, because kernels take four at once."""
    if slots <= 4:
        return 1 << max(0, (slots - 1).bit_length() - 1)
    return 4 * max(1, round(slots / 8))


@triton.jit
def _last_valid(a, b):
    return tl.maximum(a, b)


# One compilation for all steps: what changes from step to step is not specialised.
@triton.jit(
    do_not_specialize=["stride_table", "num_tokens", "num_reqs", "num_decodes", "search_steps"]
)
def _tables_kernel(
    p_block_table,
    stride_table,
    p_seq_lens,
    p_query_start,
    p_slot_mapping,
    num_tokens,
    p_text_table,
    stride_text,
    p_text_lens,
    p_context_lens,
    p_runs,
    stride_runs,
    p_num_runs,
    p_visual_lens,
    p_items,
    p_item_start,
    p_half_start,
    p_program_item,
    p_plan,
    p_page_ids,
    p_page_tokens,
    p_page_rows,
    num_reqs,
    num_decodes,
    target_programs,
    search_steps,
    PAGE_TOKENS: tl.constexpr,
    BC: tl.constexpr,
):
    i_req = tl.program_id(0)
    o_c = tl.arange(0, BC)
    if i_req < num_reqs:
        seq_len = tl.load(p_seq_lens + i_req)
        query_len = tl.load(p_query_start + i_req + 1) - tl.load(p_query_start + i_req)
        context = tl.maximum(seq_len - query_len, 0)
        p_row = p_block_table + i_req.to(tl.int64) * stride_table
        p_text = p_text_table + i_req.to(tl.int64) * stride_text
        p_run = p_runs + i_req.to(tl.int64) * stride_runs
        num_blocks = (seq_len + 15) // 16
        num_text = 0
        text_len = 0
        context_text = 0
        num_runs = 0
        num_visual = 0
        last_seen = -1  # index of the last visual block of the chunks so far
        for start in range(0, num_blocks, BC):
            o_b = start + o_c
            m_b = o_b < num_blocks
            ids = tl.load(p_row + o_b, mask=m_b, other=0)
            visual = m_b & (ids > PAGE_MASK)
            text = m_b & (ids <= PAGE_MASK)
            at = num_text + tl.cumsum(text.to(tl.int32), 0) - 1
            tl.store(p_text + at, ids, mask=text)
            num_text += tl.sum(text.to(tl.int32), 0)
            text_len += tl.sum(tl.where(text, tl.minimum(seq_len - o_b * 16, 16), 0), 0)
            before = tl.minimum(tl.maximum(context - o_b * 16, 0), 16)
            context_text += tl.sum(tl.where(text, before, 0), 0)
            # A visual block goes on with the run of the visual block before it, wherever that is.
            visual = visual & (o_b * 16 < context)
            ids_left = tl.load(p_row + o_b - 1, mask=m_b & (o_b > 0), other=0)
            left = tl.where((ids_left > PAGE_MASK) & m_b & (o_b > 0), o_b - 1, -1)
            prev = tl.maximum(tl.associative_scan(left, 0, _last_valid), last_seen)
            prev_id = tl.load(p_row + prev, mask=visual & (prev >= 0), other=-1)
            starts = visual & (ids != prev_id + _ONE_SLOT)
            run = num_runs + tl.cumsum(starts.to(tl.int32), 0) - 1
            tl.store(p_run + run * 2, ids, mask=starts)
            tl.store(p_run + (run - 1) * 2 + 1, (prev_id >> TAG) - 1, mask=starts & (run > 0))
            num_runs += tl.sum(starts.to(tl.int32), 0)
            num_visual += tl.sum(visual.to(tl.int32), 0)
            last_seen = tl.maximum(last_seen, tl.max(tl.where(visual, o_b, -1), 0))
        if num_runs > 0:
            last_id = tl.load(p_row + last_seen)
            tl.store(p_run + (num_runs - 1) * 2 + 1, (last_id >> TAG) - 1)
        tl.store(p_text_lens + i_req, text_len)
        tl.store(p_context_lens + i_req, context_text)
        tl.store(p_num_runs + i_req, num_runs)
        tl.store(p_visual_lens + i_req, num_visual * 16)
    else:
        num_pages = 0
        last_seen = -1  # row of the last visual token of the chunks so far
        for start in range(0, num_tokens, BC):
            o_t = start + o_c
            m_t = o_t < num_tokens
            slot = tl.load(p_slot_mapping + o_t, mask=m_t, other=-1).to(tl.int32)
            block = slot >> 4
            visual = (slot >= 0) & (block > PAGE_MASK)
            position = ((block >> TAG) - 1) * 16 + (slot & 15)
            starts = visual & (position == 0)
            page = num_pages + tl.cumsum(starts.to(tl.int32), 0) - 1
            tl.store(p_page_rows + page.to(tl.int64) * PAGE_TOKENS + position, o_t, mask=visual)
            tl.store(p_page_ids + page, block & PAGE_MASK, mask=starts)
            left_slot = tl.load(p_slot_mapping + o_t - 1, mask=m_t & (o_t > 0), other=-1).to(
                tl.int32
            )
            left = tl.where((left_slot >= 0) & ((left_slot >> 4) > PAGE_MASK), o_t - 1, -1)
            prev = tl.maximum(tl.associative_scan(left, 0, _last_valid), last_seen)
            prev_slot = tl.load(p_slot_mapping + prev, mask=starts & (prev >= 0), other=0).to(
                tl.int32
            )
            prev_tokens = ((prev_slot >> (TAG + 4)) - 1) * 16 + (prev_slot & 15) + 1
            tl.store(p_page_tokens + page - 1, prev_tokens, mask=starts & (page > 0))
            num_pages += tl.sum(starts.to(tl.int32), 0)
            last_seen = tl.maximum(last_seen, tl.max(tl.where(visual, o_t, -1), 0))
        if num_pages > 0:
            last_slot = tl.load(p_slot_mapping + last_seen).to(tl.int32)
            tokens = ((last_slot >> (TAG + 4)) - 1) * 16 + (last_slot & 15) + 1
            tl.store(p_page_tokens + num_pages - 1, tokens)
        tl.store(p_plan + 2, num_pages)

    tl.debug_barrier()
    ticket = tl.atomic_add(p_plan + 3, 1, sem="acq_rel")
    if ticket == tl.num_programs(0) - 1:
        total = 0
        for start in range(0, num_decodes, BC):
            o_r = start + o_c
            total += tl.sum(
                tl.load(p_num_runs + o_r, mask=o_r < num_decodes, other=0, cache_modifier=".cg"), 0
            )
        share = tl.maximum((2 * total + target_programs - 1) // target_programs, 1)
        # The least of three shares by which no program needs a second request, or 0.
        more = tl.maximum(share // 8, 1)
        needed_0, needed_1, needed_2 = 0, 0, 0
        for start in range(0, num_decodes, BC):
            o_r = start + o_c
            runs = tl.load(p_num_runs + o_r, mask=o_r < num_decodes, other=0, cache_modifier=".cg")
            needed_0 += tl.sum((2 * runs + share - 1) // share, 0)
            needed_1 += tl.sum((2 * runs + share + more - 1) // (share + more), 0)
            needed_2 += tl.sum((2 * runs + share + 2 * more - 1) // (share + 2 * more), 0)
        single = tl.where(needed_2 <= target_programs, share + 2 * more, 0)
        single = tl.where(needed_1 <= target_programs, share + more, single)
        single = tl.where(needed_0 <= target_programs, share, single)
        share = tl.where(single > 0, single, share)
        num_items = 0
        halves = 0  # half runs of the requests so far
        for start in range(0, num_reqs + 1, BC):
            o_r = start + o_c
            runs = tl.load(p_num_runs + o_r, mask=o_r < num_decodes, other=0, cache_modifier=".cg")
            end = halves + 2 * tl.cumsum(runs, 0)
            begin = end - 2 * runs
            items = tl.where(runs > 0, (end - 1) // share - begin // share + 1, 0)
            items = tl.where(single > 0, (2 * runs + share - 1) // share, items)
            first = num_items + tl.cumsum(items, 0) - items
            tl.store(p_item_start + o_r, first, mask=o_r <= num_reqs)
            tl.store(p_half_start + o_r, begin, mask=o_r <= num_reqs)
            num_items += tl.sum(items, 0)
            halves += 2 * tl.sum(runs, 0)
        num_programs = tl.where(single > 0, num_items, (2 * total + share - 1) // share)
        tl.store(p_plan, num_programs)
        tl.store(p_plan + 1, share)
        tl.store(p_plan + 3, 0)
        tl.store(p_plan + 4, num_items)
        tl.store(p_plan + 5, total)
        tl.store(p_program_item + num_programs, num_items)
        tl.debug_barrier()
        for start in range(0, num_items, BC):
            o_i = start + o_c
            m_i = o_i < num_items
            low = tl.zeros([BC], tl.int32)  # the last request whose first item is at most o_i
            high = tl.zeros([BC], tl.int32) + num_reqs - 1
            for _ in range(search_steps):
                middle = (low + high + 1) // 2
                first = tl.load(p_item_start + middle, mask=m_i, other=0)
                low = tl.where(first <= o_i, middle, low)
                high = tl.where(first <= o_i, high, middle - 1)
            first = tl.load(p_item_start + low, mask=m_i, other=0)
            runs = tl.load(p_num_runs + low, mask=m_i, other=0, cache_modifier=".cg")
            origin = tl.load(p_half_start + low, mask=m_i, other=0)
            program = tl.where(single > 0, o_i, origin // share + o_i - first)
            own_begin, own_end = program * share, (program + 1) * share
            pieces = tl.maximum((2 * runs + share - 1) // share, 1)
            piece = origin + (o_i - first) * 2 * runs // pieces
            next_piece = origin + (o_i - first + 1) * 2 * runs // pieces
            own_begin = tl.where(single > 0, piece, own_begin)
            own_end = tl.where(single > 0, next_piece, own_end)
            begin = tl.maximum(own_begin, origin)
            end = tl.minimum(own_end, origin + 2 * runs)
            p_run = p_runs + low.to(tl.int64) * stride_runs + (begin - origin) // 2 * 2
            tl.store(p_items + 4 * o_i, low, mask=m_i)
            tl.store(p_items + 4 * o_i + 1, begin - origin, mask=m_i)
            tl.store(p_items + 4 * o_i + 2, end - origin, mask=m_i)
            first_id = tl.load(p_run, mask=m_i, other=0, cache_modifier=".cg")
            tl.store(p_items + 4 * o_i + 3, first_id, mask=m_i)
            tl.store(p_program_item + program, o_i, mask=m_i & (begin == own_begin))


def build_tables(
    tables: StepTables,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_decodes: int,
) -> None:
    """Fill ``tables`` for a step; one launch, no host synchronisation.

    Parameters
    ----------
    tables
        Buffers of :func:`allocate_tables`; written in place.
    block_table
        int32 ``[num_reqs, max_num_blocks]`` of tagged block ids; what lies past a request's length
        is ignored.
    seq_lens
        int32 ``[num_reqs]``: tokens of each request, this step's included.  0 for a padding row.
    query_start_loc
        int32 ``[num_reqs + 1]``: first row of each request in this step.
    slot_mapping
        int64 ``[num_tokens]``: ``tagged id * 16 + offset`` of each row; negative for padding.
    num_decodes
        The first ``num_decodes`` requests are decoded with :func:`csrc_triton.decode_attention` and
        get items; the others are for :func:`csrc_triton.prefill_attention`.

    Raises
    ------
    ValueError
        If a buffer is too small for this step.
    """
    num_reqs = seq_lens.shape[0]
    if num_reqs > tables.num_runs.shape[0] or num_decodes > num_reqs:
        raise ValueError(
            f"{num_reqs} requests ({num_decodes} decodes) do not fit buffers for "
            f"{tables.num_runs.shape[0]}"
        )
    if block_table.shape[1] > tables.text_block_table.shape[1]:
        raise ValueError(
            f"block table has {block_table.shape[1]} columns, buffers have "
            f"{tables.text_block_table.shape[1]}"
        )
    if slot_mapping.shape[0] // (2 * BLOCK) > tables.page_ids.shape[0]:
        raise ValueError(f"{slot_mapping.shape[0]} tokens do not fit the page list")
    tables.num_prefills = num_reqs - num_decodes
    launch(
        _tables_kernel, (num_reqs + 1,),
        block_table, block_table.stride(0), seq_lens, query_start_loc, slot_mapping,
        slot_mapping.shape[0],
        tables.text_block_table, tables.text_block_table.stride(0), tables.text_lens,
        tables.context_text_lens, tables.runs, tables.runs.stride(0), tables.num_runs,
        tables.visual_lens, tables.items, tables.item_start,
        tables.half_start, tables.program_item, tables.plan,
        tables.page_ids, tables.page_tokens, tables.page_rows,
        num_reqs, num_decodes, tables.target_programs, (num_reqs - 1).bit_length(),
        PAGE_TOKENS=tables.page_rows.shape[1], BC=1024, num_warps=4,
    )  # fmt: skip


def naive_tables(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> dict[str, list]:
    """Twin of :func:`build_tables` in plain Python.

    Returns
    -------
    dict
        ``text_blocks``, ``runs`` (pairs) per request; ``text_lens``, ``context_text_lens``,
        ``visual_lens``; and ``pages``: (page, rows) of each visual page of the step.
    """
    mask = (1 << TAG_SHIFT) - 1
    out: dict[str, list] = {
        "text_blocks": [], "runs": [], "text_lens": [], "context_text_lens": [], "visual_lens": [],
        "pages": [],
    }  # fmt: skip
    starts = query_start_loc.tolist()
    for r, seq_len in enumerate(seq_lens.tolist()):
        context = max(seq_len - (starts[r + 1] - starts[r]), 0)
        text, runs, text_len, context_text, visual = [], [], 0, 0, 0
        last = None
        for i in range(-(-seq_len // BLOCK)):
            block = int(block_table[r, i])
            if block <= mask:
                text.append(block)
                text_len += min(seq_len - i * BLOCK, BLOCK)
                context_text += min(max(context - i * BLOCK, 0), BLOCK)
            elif i * BLOCK < context:
                if block - (1 << TAG_SHIFT) == last:
                    runs[-1] = (runs[-1][0], (block >> TAG_SHIFT) - 1)
                else:
                    runs.append((block, (block >> TAG_SHIFT) - 1))
                last = block
                visual += BLOCK
        for key, value in zip(
            ("text_blocks", "runs", "text_lens", "context_text_lens", "visual_lens"),
            (text, runs, text_len, context_text, visual),
            strict=True,
        ):
            out[key].append(value)
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0 and (slot >> 4) > mask:
            position = ((slot >> (TAG_SHIFT + 4)) - 1) * BLOCK + slot % BLOCK
            if position == 0:
                out["pages"].append(((slot >> 4) & mask, []))
            assert position == len(out["pages"][-1][1]), "tokens of a page must come in order"
            out["pages"][-1][1].append(row)
    return out
