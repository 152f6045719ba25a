"""Deterministic questions on generated images, split by seed.

``python -m tests.tinyvlm.dataset OUT --split test --seed 1 --count 300`` writes
``OUT/images/*.png`` and ``OUT/qa.jsonl``.  Generator seeds of different splits, seeds and tasks
never meet, and none is used by train.py.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .generator import TASKS, Generator

# The model reads "bar" (the value of the bar with a given letter) at chance level: see README.md.
LEARNED = tuple(task for task in TASKS if task != "bar")
SPLITS = {"train": 10_000_000, "calibration": 20_000_000, "test": 30_000_000}
BATCH = 16
SCENES = {  # documents, grids, charts in a batch
    "field": (BATCH, 0, 0),
    "line": (BATCH, 0, 0),
    "count": (0, BATCH, 0),
    "cell": (0, BATCH, 0),
    "where": (0, BATCH, 0),
    "bar": (0, 0, BATCH),
    "barn": (0, 0, BATCH),
}


@dataclass(frozen=True)
class Example:
    """One question on one image, with its true answer."""

    task: str
    question: str
    answer: str
    image: Image.Image


def examples(split="test", seed=1, count=300, tasks=LEARNED, noise=0.0):
    """Yield `count` examples of each task, each on an image of its own.

    Parameters
    ----------
    split : {"train", "calibration", "test"}
    seed : int
        Below 100 000, so that splits stay disjoint.
    count : int
    tasks : sequence of str
    noise : float
        Standard deviation of white noise, of 1.0.
    """
    if not 0 <= seed < 100_000:
        raise ValueError(f"seed {seed} is not in [0, 100000)")
    for task in tasks:
        index = TASKS.index(task)
        generator = Generator(SPLITS[split] + seed * 100 + index)
        found = 0
        while found < count:
            batch = generator.batch(*SCENES[task], noise=noise)
            for i in range(BATCH):
                suitable = (batch.task[i] == index).nonzero().flatten()
                if len(suitable) and found < count:
                    j = suitable[0]
                    text = generator.text(batch.segments[i, j], batch.is_answer[i, j])
                    image = Image.fromarray(batch.images[i].permute(1, 2, 0).contiguous().numpy())
                    found += 1
                    yield Example(task, *text, image)


def write(out, rows):
    """Write examples as PNG files and ``qa.jsonl`` into the directory `out`."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    with open(out / "qa.jsonl", "w", encoding="utf-8") as lines:
        for i, row in enumerate(rows):
            name = f"images/{row.task}_{i:05d}.png"
            row.image.save(out / name, optimize=True)
            record = {
                "image": name, "task": row.task, "question": row.question, "answer": row.answer
            }  # fmt: skip
            lines.write(json.dumps(record) + "\n")


def read(directory):
    """Read what `write` has written."""
    directory = Path(directory)
    with open(directory / "qa.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for record in records:
        record["image"] = Image.open(directory / record["image"]).convert("RGB")
    return [Example(**record) for record in records]


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=LEARNED)
    parser.add_argument("--noise", type=float, default=0.0)
    args = parser.parse_args()
    write(args.out, examples(args.split, args.seed, args.count, args.tasks, args.noise))


if __name__ == "__main__":
    main()
