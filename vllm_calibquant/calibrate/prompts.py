"""Calibration prompts: a directory of images with questions, or pictures drawn here."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vllm_calibquant.config import ConfigError

SYNTHETIC = "synthetic"
PROMPTS = "prompts.jsonl"
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "orange", "black")
WORDS = (
    "invoice total paper river garden seven market window report signal number yellow station "
    "history engine coffee ticket account letter summer bridge library quarter morning"
).split()


@dataclass(frozen=True)
class Prompt:
    """A question on images, in this order."""

    images: tuple[Image.Image, ...]
    question: str


def load_prompts(source: str, count: int, seed: int) -> list[Prompt]:
    """Prompts of a source.

    Parameters
    ----------
    source
        ``synthetic``, a directory with ``prompts.jsonl``, or such a file.  A line is an object with
        ``question`` and ``image``, one path or a list of them, relative to the file; other keys are
        not looked at.
    count
        At most so many, evenly from the whole file.
    seed
        Of synthetic prompts.

    Raises
    ------
    ConfigError
        If there is no such file, no prompt in it, or a line that cannot be used.
    """
    if source == SYNTHETIC:
        chance = random.Random(seed)
        return [_draw(chance) for _ in range(count)]
    path = Path(source)
    path = path / PROMPTS if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"--data {source}: there is no {path}; give a directory with {PROMPTS}, such a file, "
            f"or {SYNTHETIC}"
        )
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--data {source}: {path} has no line")
    count = min(count, len(lines))
    return [_read(path, i * len(lines) // count, lines) for i in range(count)]


def _read(path: Path, index: int, lines: list[str]) -> Prompt:
    try:
        record = json.loads(lines[index])
        names = record["image"]
        names = [names] if isinstance(names, str) else names
        images = tuple(Image.open(path.parent / name).convert("RGB") for name in names)
        return Prompt(images, str(record["question"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path}, line {index + 1}: {type(error).__name__} {error}") from None


def _draw(chance: random.Random) -> Prompt:
    """A picture of shapes, of lines of text or of both, and a question on it."""
    size = chance.choice((336, 448, 672))
    image = Image.new("RGB", (size, size), chance.choice(("white", "#f2efe6", "#e6eef5")))
    draw = ImageDraw.Draw(image)
    kind = chance.choice(("shapes", "text", "both"))
    lines: list[str] = []
    if kind != "text":
        for _ in range(chance.randint(3, 12)):
            _shape(draw, chance, size, half=kind == "both")
    if kind != "shapes":
        height = size // chance.choice((14, 18, 24))
        font = ImageFont.load_default(height)
        top = size // 2 if kind == "both" else size // 16
        while top + 2 * height < size:
            words = [*chance.sample(WORDS, chance.randint(1, 4)), str(chance.randint(10, 99999))]
            lines.append(" ".join(words))
            draw.text((size // 16, top), lines[-1], "black", font)
            top += height * 7 // 4
    questions = ["Describe this picture in a few sentences."]
    if lines:
        questions += [
            "Read the text in this picture, line by line.",
            f"What does line {chance.randint(1, len(lines))} of the text say?",
            "Which numbers are written in this picture?",
        ]
    if kind != "text":
        questions += [
            f"How many {chance.choice(COLOURS)} shapes are there?",
            f"Where is a {chance.choice(SHAPES)}, and which colour has it?",
            "List the shapes in this picture with their colours.",
        ]
    return Prompt((image,), chance.choice(questions))


def _shape(draw: ImageDraw.ImageDraw, chance: random.Random, size: int, half: bool) -> None:
    r = chance.randint(size // 24, size // 10)
    x = chance.randint(r, size - r)
    y = chance.randint(r, (size // 2 if half else size) - r)
    colour, shape = chance.choice(COLOURS), chance.choice(SHAPES)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
