"""What the host knows of the worker's block table."""

from vllm_calibquant.block_rows import BlockRows
from vllm_calibquant.tags import tag


def test_rows_with_visual_blocks():
    rows = BlockRows()
    rows.append(0, ([1, 2, 3],), overwrite=True)
    rows.append(1, ([4, tag(5, 0), tag(5, 1)],), overwrite=True)
    assert not rows.any_visual([0, 2])
    assert rows.any_visual([0, 1])
    rows.append(0, ([], [7, tag(8, 13)]), overwrite=False)  # a block comes later, in any group
    assert rows.any_visual([0])
    rows.append(1, ([9],), overwrite=True)  # another request
    assert not rows.any_visual([1])
    assert not rows.any_visual([])


def test_where_the_first_visual_block_of_a_row_begins():
    rows = BlockRows()
    rows.append(3, ([1, 2],), overwrite=True)
    assert rows.visual_begin(3) == 0
    rows.append(3, ([4, tag(5, 0), tag(5, 1), 2],), overwrite=False)
    rows.append(3, ([tag(6, 0), tag(6, 1)],), overwrite=False)
    assert rows.visual_begin(3) == 3
    rows.append(3, ([1] * 8, [1, tag(3, 0), 4]), overwrite=True)  # groups count on their own
    assert rows.visual_begin(3) == 1
    rows.append(3, ([1, 2, tag(3, 0)], [1, tag(3, 1)]), overwrite=True)  # the first of any counts
    assert rows.visual_begin(3) == 1
    rows.append(3, ([tag(5, 0)],), overwrite=True)
    assert rows.visual_begin(3) == 0


def test_where_the_last_visual_block_of_a_row_ends():
    rows = BlockRows()
    rows.append(3, ([1, tag(5, 0), tag(5, 1), 2],), overwrite=True)
    assert (rows.visual_end(3), rows.visual_end(4)) == (3, 0)
    rows.append(3, ([6, 7],), overwrite=False)
    assert rows.visual_end(3) == 3
    rows.append(3, ([8, tag(9, 0)],), overwrite=False)
    assert rows.visual_end(3) == 8
    rows.append(3, ([1] * 8, [1, 2, tag(3, 0), 4]), overwrite=True)  # groups count on their own
    assert rows.visual_end(3) == 3
    rows.append(3, ([], [tag(3, 1)]), overwrite=False)
    assert rows.visual_end(3) == 5
    rows.append(3, ([1],), overwrite=True)
    assert rows.visual_end(3) == 0


def test_rows_whose_text_lies_where_codes_were():
    rows = BlockRows()
    rows.append(0, ([tag(5, 0), tag(6, 0), 7],), overwrite=True)
    rows.append(1, ([5, 8],), overwrite=True)
    assert rows.any_recycled([1])
    assert not rows.any_recycled([0])
    rows.append(2, ([5],), overwrite=True)  # the page has held text since
    assert not rows.any_recycled([2])
    rows.append(3, ([9], [10, 6]), overwrite=True)
    rows.append(3, ([11], []), overwrite=False)  # still the same request
    assert rows.any_recycled([3])
    rows.append(3, ([11],), overwrite=True)
    assert not rows.any_recycled([3])
    rows.append(0, ([tag(5, 0)],), overwrite=True)  # codes again
    rows.append(2, ([5],), overwrite=False)
    assert rows.any_recycled([2])
