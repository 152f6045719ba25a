"""build_tables against naive_tables."""

import pytest
import torch

from csrc_triton import allocate_tables, build_tables
from csrc_triton.metadata import naive_tables
from tests.kernels.cases import BLOCK, stale_table
from vllm_calibquant.tags import tag

T = 3  # any text page


def run(requests, seq_lens, query_lens, slots, *, num_decodes, target=4, width=None, repeats=2):
    table = stale_table(requests, width or max(len(r) for r in requests) + 5)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    mapping = torch.tensor(slots, dtype=torch.int64)
    tables = allocate_tables(
        max_num_reqs=len(requests) + 2, max_num_blocks=table.shape[1] + 3,
        max_num_tokens=max(len(slots), 64), slots=14, num_kv_heads=1, device="cpu", num_sms=target,
        programs_per_sm=1,
    )  # fmt: skip
    for name in ("text_block_table", "runs", "items", "item_start", "program_item",
                 "half_start", "page_rows", "page_tokens"):  # fmt: skip
        getattr(tables, name).fill_(-77)
    for _ in range(repeats):  # the ticket counter must come back to 0
        build_tables(tables, table, lens, starts, mapping, num_decodes=num_decodes)
    want = naive_tables(table, lens, starts, mapping)
    for r in range(len(requests)):
        n = len(want["text_blocks"][r])
        assert tables.text_block_table[r, :n].tolist() == want["text_blocks"][r]
        assert tables.text_lens[r] == want["text_lens"][r]
        assert tables.context_text_lens[r] == want["context_text_lens"][r]
        assert tables.visual_lens[r] == want["visual_lens"][r]
        runs = [tuple(x) for x in tables.runs[r, : tables.num_runs[r]].tolist()]
        assert runs == want["runs"][r]
    pages = tables.plan[2].item()
    got = [
        (tables.page_ids[i].item(), tables.page_rows[i, : tables.page_tokens[i]].tolist())
        for i in range(pages)
    ]
    assert got == want["pages"]
    programs, share = tables.plan[:2].tolist()
    runs = tables.num_runs[:num_decodes].tolist()
    least = max(1, -(-2 * sum(runs) // target))
    choices = [least + i * max(least // 8, 1) for i in range(3)]
    single = [s for s in choices if sum(-(-2 * n // s) for n in runs) <= target]
    assert share == (single or [least])[0]
    assert programs <= tables.target_programs
    seen = []
    for p in range(programs):
        mine = []
        for i in range(tables.program_item[p], tables.program_item[p + 1]):
            r, begin, end, first = tables.items[i].tolist()
            assert tables.item_start[r] <= i < tables.item_start[r + 1]
            new = [(r, j) for j in range(begin, end)]
            assert new and first == tables.runs[r, begin // 2, 0]
            mine += new
        if single:
            assert tables.program_item[p + 1] == tables.program_item[p] + 1
            pieces = -(-2 * runs[mine[0][0]] // share)
            assert len(mine) in (2 * runs[mine[0][0]] // pieces, -(-2 * runs[mine[0][0]] // pieces))
        else:
            assert len(mine) == share or p == programs - 1
        assert len(mine) <= share
        seen += mine
    assert seen == [(r, i) for r in range(num_decodes) for i in range(2 * tables.num_runs[r])]
    items = tables.program_item[programs].item()
    assert items <= tables.items_for(num_decodes)
    assert tables.item_start[len(requests)] == items
    assert tables.plan[3] == 0
    return tables


def visual(page, first, n):
    return [tag(page, first + s) for s in range(n)]


def test_mixed_batch():
    requests = [
        [T, *visual(9, 0, 14), *visual(4, 0, 3), 7, 8],  # text, a full and a partly full page, text
        [5],
        [*visual(9, 6, 8), *visual(11, 0, 14), *visual(9, 0, 2), 2],  # hit in mid-page, page again
        [6, *visual(12, 0, 1), 13, *visual(12, 1, 4), 14],  # run that text blocks interrupt
    ]
    lens = [(len(r) - 1) * BLOCK + 5 for r in requests]
    run(requests, lens, [1] * 4, [r[-1] * 16 + 4 for r in requests], num_decodes=4)


def test_stale_ids_and_padding_rows():
    requests = [[T, *visual(3, 0, 5), 1], [], []]
    run(requests, [7 * BLOCK, 0, 0], [1, 0, 0], [1 * 16 + 15, -1, -1], num_decodes=3)


def test_prefill_ignores_visual_blocks_of_this_step():
    requests = [[T, *visual(5, 0, 4), *visual(6, 0, 4), 2], [8, 9]]
    rows = [tag(6, i // 16) * 16 + i % 16 for i in range(64)] + [2 * 16 + i for i in range(3)]
    tables = run(requests, [9 * BLOCK + 3, 20], [67, 20], rows + [8 * 16 + i for i in range(20)],
                 num_decodes=0)  # fmt: skip
    assert tables.visual_lens.tolist()[:2] == [64, 0]
    assert tables.context_text_lens.tolist()[:2] == [16, 0]


def test_pages_of_a_step_with_gaps_between_their_tokens():
    text = [1 * 16 + i for i in range(16)]
    a = [tag(20, 0) * 16 + i for i in range(16)]
    b = [tag(20, 1) * 16 + i for i in range(16)]
    c = [tag(21, s) * 16 + i for s in range(14) for i in range(16)]
    d = [tag(22, s) * 16 + i for s in range(2) for i in range(16)]
    slots = a + text + b + c + [-1] * 3 + d
    tables = run([[T]], [1], [1], slots, num_decodes=1)
    assert tables.plan[2] == 3


@pytest.mark.parametrize(("target", "single"), [(2, False), (3, True), (5, True), (9, True)])
def test_programs_have_one_request_each_where_they_suffice(target, single):
    requests = [[T], *([*visual(p, 0, 14), *visual(p + 30, 0, 14), 1] for p in (5, 6, 7))]
    lens = [len(r) * BLOCK - 3 for r in requests]
    tables = run(requests, lens, [1] * 4, [16] * 4, num_decodes=4, target=target)
    programs = tables.plan[0].item()
    assert (tables.program_item[programs] == programs) == single


@pytest.mark.parametrize("decodes", [0, 3])
def test_more_blocks_and_tokens_than_one_chunk(decodes):
    g = torch.Generator().manual_seed(3)
    requests = []
    for r in range(3):
        ids = []
        while len(ids) < 1300 + 40 * r:
            page = int(torch.randint(0, 1 << 23, (1,), generator=g))
            first = int(torch.randint(0, 14, (1,), generator=g))
            if first % 3 == 0:
                ids.append(page)
            else:
                ids += visual(page, first, int(torch.randint(1, 15 - first, (1,), generator=g)))
        requests.append(ids + [1])
    lens = [len(r) * BLOCK - 3 for r in requests]
    slots = [tag(p, s) * 16 + i for p in range(9) for s in range(14) for i in range(16)]
    run(requests, lens, [1, 1, 1], slots, num_decodes=decodes, target=7)


def test_refuses_what_does_not_fit():
    tables = allocate_tables(max_num_reqs=1, max_num_blocks=4, max_num_tokens=32, slots=14,
                             num_kv_heads=1, device="cpu")  # fmt: skip
    one = torch.ones(1, dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    row = torch.zeros(1, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="columns"):
        build_tables(tables, row, one, starts, one.long(), num_decodes=1)
    with pytest.raises(ValueError, match="requests"):
        build_tables(tables, row[:, :4], one, starts, one.long(), num_decodes=2)
    with pytest.raises(ValueError, match="tokens"):
        build_tables(tables, row[:, :4], one, starts, torch.zeros(64).long(), num_decodes=1)
