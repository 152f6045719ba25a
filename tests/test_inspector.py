"""``vllm-calibquant inspect`` on the tiny model, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.serving.engine import BLOCK, IMAGE_TOKENS
from tests.tinyvlm.dataset import Example, examples
from tests.tinyvlm.unpack import model_path
from vllm_calibquant.cli import main
from vllm_calibquant.inspector import Inspection, ratio, token_grid
from vllm_calibquant.inspector_page import RAMP, colour

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless-shell")
LLM = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def example() -> Example:
    return next(examples(seed=9, count=1, tasks=("line",)))


@pytest.fixture(scope="module")
def page(tmp_path_factory, example) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    example.image.save(folder / "image.png")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # and back, after it is set
        main(
            ["inspect", str(model_path()), str(folder / "image.png"), example.question]
            + ["--out", str(folder / "page.html"), "--widths", "4", "1"]
            + ["--max-tokens", "16", "--llm", json.dumps(LLM)]
        )
    return folder / "page.html"


class Elements(HTMLParser):
    """All elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script":
            self.scripts.append(data)

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag and attributes.items() <= a.items()]


@pytest.fixture(scope="module")
def data(page) -> dict:
    return json.loads(Elements(page.read_text()).scripts[0])


def test_answers(data, example) -> None:
    exact, four, one = data["settings"]
    assert [s["name"] for s in data["settings"]] == ["16 bits", "4 bits", "1 bit"]
    assert exact["cold"] == four["cold"] == four["hit"] == example.answer
    assert exact["hit"] is None and one["hit"] is not None
    assert (exact["page_tokens"], four["page_tokens"], one["page_tokens"]) == (None, 48, 224)


def test_errors_fall_with_bits(data) -> None:
    _, four, one = data["settings"]
    assert four["layers"] == one["layers"] == list(range(6))
    for name, heads in (("key", 2), ("value", 2), ("output", 6)):
        fine, coarse = torch.tensor(four[name]), torch.tensor(one[name])
        assert fine.shape == coarse.shape == (6, heads)
        assert (fine > 0).all() and (fine < coarse).all()
        assert fine.mean() < 0.12 and 0.3 < coarse.mean() < 1.5


def test_tokens(data) -> None:
    """The image's tokens stand at positions 1 to 576; their blocks fill pages in order."""
    assert data["tokens"] == IMAGE_TOKENS and data["grid"] == [24, 24]
    for setting, slots in zip(data["settings"][1:], (3, 14), strict=True):
        blocks = [(t + 1) // BLOCK for t in range(IMAGE_TOKENS)]
        expected = [(b - 1) // slots if 0 < b < IMAGE_TOKENS // BLOCK else -1 for b in blocks]
        assert setting["pages"] == expected
        errors = setting["token_error"]
        assert [e is None for e in errors] == [p < 0 for p in expected]
        attention = torch.tensor(setting["attention"])
        assert (attention >= 0).all() and 0.05 < attention.sum() <= 1


def test_page_needs_nothing_else(page) -> None:
    text = page.read_text()
    elements = Elements(text)
    links = [a.get("src") or a.get("href") for _, a in elements.found]
    assert [link[:22] for link in links if link] == ["data:image/png;base64,"]
    assert not re.search(r"https?://|@import|fetch\(|XMLHttp", text)
    assert len(elements.of("rect", **{"class": "key"})) == 2 * 6 * 2
    assert len(elements.of("rect", **{"class": "output"})) == 2 * 6 * 6


def run_browser(page: Path, fragment: str, *options: str) -> str:
    """What a real browser prints of the page, its script included."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", *options),
        *(f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=3000"),
        f"{page.as_uri()}#{fragment}",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def in_browser(page: Path, fragment: str) -> Elements:
    """The page's elements after its script."""
    return Elements(run_browser(page, fragment, "--dump-dom"))


def screenshot(page: Path, fragment: str, width: int, height: int) -> Image.Image:
    """The page as it is painted, from its top."""
    file = page.parent / f"{fragment}-{width}.png"
    size = f"--window-size={width},{height}"
    run_browser(page, fragment, f"--screenshot={file}", "--hide-scrollbars", size)
    return Image.open(file).convert("RGB")


def assert_painted(shot: Image.Image) -> None:
    """The colours of four visual pages, text, and nothing in the margins."""
    pixels = torch.frombuffer(bytearray(shot.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(shot.height, shot.width, 3).int()
    assert pixels.shape == (1600, shot.width, 3)
    margins = torch.cat([pixels[:, :16].flatten(0, 1), pixels[:, -16:].flatten(0, 1)])
    assert torch.equal(margins.unique(dim=0), torch.tensor([[0xF4, 0xF6, 0xFA]]))
    spread = pixels.amax(-1) - pixels.amin(-1)
    assert (spread > 40).double().mean() > 0.1  # the picture under its pages
    assert (pixels.amax(-1) < 80).double().mean() > 0.001  # letters


def test_browser_shows_pages(page, data) -> None:
    dom = in_browser(page, "page-2")
    tokens = [a for a in dom.of("rect") if "fill-opacity" in a]
    assert len(tokens) == IMAGE_TOKENS
    pages = data["settings"][2]["pages"]
    fills = {p: {t["fill"] for t, q in zip(tokens, pages, strict=True) if q == p} for p in {*pages}}
    assert fills[-1] == {"none"}
    assert all(len(f) == 1 for f in fills.values())
    assert len(set.union(*fills.values())) == len(fills) == 4
    assert dom.of("div", id="scale")[0].keys() >= {"hidden"}
    for width in (1280, 480):
        assert_painted(screenshot(page, "page-2", width, 1600))


def test_browser_shows_attention(page, data) -> None:
    dom = in_browser(page, "attention-1")
    tokens = [a for a in dom.of("rect") if "fill-opacity" in a]
    opacity = torch.tensor([float(t["fill-opacity"]) for t in tokens])
    attention = torch.tensor(data["settings"][1]["attention"])
    torch.testing.assert_close(opacity, 0.85 * attention / attention.max(), atol=1e-3, rtol=1e-3)
    assert "hidden" not in dom.of("div", id="scale")[0]


@pytest.mark.parametrize(
    ("tokens", "aspect", "grid"),
    [
        (576, 1.0, (24, 24)),
        (576, 1.7, (24, 24)),  # square input
        (12 * 20, 20 / 12, (12, 20)),
        (20 * 12, 0.62, (20, 12)),
        (257, 1.0, (1, 257)),
        (3328, 0.9, (64, 52)),
    ],
)
def test_token_grid(tokens, aspect, grid) -> None:
    assert token_grid(tokens, aspect) == grid


def test_colours_and_ratios() -> None:
    assert colour(0) == RAMP[0] and colour(1) == colour(7) == RAMP[-1] and colour(0.5) == RAMP[2]
    assert ratio(torch.tensor([4.0, 0.0]), torch.tensor([16.0, 0.0])).tolist() == [0.5, 0.0]


def test_tiles_are_no_grid() -> None:
    """12 tiles of 256 tokens and a small copy of the image come one after the other."""
    image = Image.new("RGB", (4 * 448, 3 * 448))
    tiles = Inspection("m", "?", image, [*range(13 * 256)], [], tile_tokens=256)
    assert tiles.grid == (1, 13 * 256)
    assert replace(tiles, positions=[*range(256)]).grid == (16, 16)
    assert replace(tiles, tile_tokens=None, positions=[*range(48 * 64)]).grid == (48, 64)


def test_a_profile_is_looked_at_first(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = ["inspect", str(model_path()), str(tmp_path / "a.png"), "?", "--profile", "none"]
    with pytest.raises(SystemExit, match="profile 'none' does not exist"):
        main([*asked, "--out", str(tmp_path / "p.html")])


@pytest.mark.parametrize("what", ["image", "directory"])
def test_refusals(tmp_path, capsys, what) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    image, out = {"image": ("b.png", "p.html"), "directory": ("a.png", "no/p.html")}[what]
    with pytest.raises(SystemExit, match=r"vllm-calibquant inspect: .*(can be read|no directory)"):
        main(["inspect", "m", str(tmp_path / image), "?", "--out", str(tmp_path / out)])
