"""The capacity benchmark holds what the project promises."""

import contextlib
import io
import re

import pytest

from benchmarks import capacity


@pytest.fixture(scope="module")
def lines() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        capacity.main()
    return printed.getvalue().splitlines()


def test_ratio_of_resident_requests(lines):
    match = re.fullmatch(r"capacity_ratio internvl=(\d+\.\d\d) llava=(\d+\.\d\d)", lines[-1])
    assert match, lines[-1]
    assert float(match[1]) >= 8
    assert float(match[2]) >= 3.4


def test_every_dtype_holds_more_than_16_bits(lines):
    rows = [line.split() for line in lines]
    ratios = {}
    for shape in ("internvl", "llava"):
        at = next(i for i, row in enumerate(rows) if row[0] == f"{shape}:")
        for row in rows[at : at + 4]:
            name = next(i for i, cell in enumerate(row) if cell.startswith(("16-bit", "calib")))
            ratios[shape, row[name]] = float(row[name + 2])
    for shape in ("internvl", "llava"):
        of_shape = [ratios[shape, dtype] for dtype in capacity.DTYPE_BITS]
        assert ratios[shape, capacity.STOCK] == 1
        assert of_shape == sorted(of_shape, reverse=True)
        assert of_shape[-1] > 2


@pytest.mark.parametrize("shape", capacity.SHAPES, ids=lambda shape: shape.name)
def test_counts_agree_with_arithmetic(shape):
    tokens = shape.before + shape.visual + shape.after + shape.generated
    stock = capacity.residents(shape, capacity.STOCK)
    assert stock.visual_pages == 0
    assert stock.text_pages == -(-tokens // 16)
    assert stock.requests == capacity.pool_pages() // stock.text_pages
    found = capacity.residents(shape, "calibquant1")
    # Blocks that lie inside the image as a whole, 14 to a page.
    blocks = (shape.before + shape.visual) // 16 - -(-shape.before // 16)
    assert found.visual_pages == -(-blocks // 14)
    assert found.text_pages == stock.text_pages - blocks
    assert found.requests == capacity.pool_pages() // (found.text_pages + found.visual_pages)
