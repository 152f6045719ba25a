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

from .generator import QUESTIONS, TASKS, Generator
from .world import PICTURES

CHATS = ("turn", "pair")
"""Questions of any task in a second turn, and questions on one of two pictures."""
ALL_TASKS = (*TASKS, *CHATS)
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
    "value": (0, 0, BATCH),
    "turn": (6, 5, 5),
    "pair": (6, 5, 5),
}


@dataclass(frozen=True)
class Example:
    """One question with its true answer.

    Attributes
    ----------
    task, question, answer : str
    image : Image
    second : Image or None
        The second picture of a prompt with two.
    before : tuple of (str, str)
        Questions and answers of earlier turns.
    """

    task: str
    question: str
    answer: str
    image: Image.Image
    second: Image.Image | None = None
    before: tuple[tuple[str, str], ...] = ()

    @property
    def images(self):
        """All pictures, in the order of the prompt."""
        return (self.image,) if self.second is None else (self.image, self.second)

    @property
    def chat(self):
        """The conversation that ends with the question, as processors and vLLM take it."""
        pictures = [{"type": "image_pil", "image_pil": image} for image in self.images]
        messages = []
        for question, answer in (*self.before, (self.question, None)):
            content = [*pictures, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            pictures = []
        return messages


def examples(split="test", seed=1, count=300, tasks=TASKS, noise=0.0):
    """Yield `count` examples of each task, each on an image of its own.

    Parameters
    ----------
    split : {"train", "calibration", "test"}
    seed : int
        Below 100 000, so that splits stay disjoint.
    count : int
    tasks : sequence of str
        Of ALL_TASKS; unless given, those that are one question on one picture.
    noise : float
        Standard deviation of white noise, of 1.0.
    """
    if not 0 <= seed < 100_000:
        raise ValueError(f"seed {seed} is not in [0, 100000)")
    for task in tasks:
        generator = Generator(SPLITS[split] + seed * 100 + ALL_TASKS.index(task))
        found = 0
        while found < count:
            batch = generator.batch(*SCENES[task], noise=noise)
            draw = {"turn": _turns, "pair": _pairs}.get(task, _questions)
            for example in draw(generator, batch, task):
                if found < count:
                    found += 1
                    yield example


def _asked(generator, batch, i, j):
    """Question j of picture i and its answer."""
    return tuple(generator.text(part.take((i, j))) for part in (batch.question, batch.answer))


def _image(batch, i):
    return Image.fromarray(batch.images[i].permute(1, 2, 0).contiguous().numpy())


def _questions(generator, batch, task):
    """The first question of a task on each picture that has one."""
    for i, tasks in enumerate(batch.task == TASKS.index(task)):
        if tasks.any():
            j = tasks.nonzero()[0, 0]
            yield Example(task, *_asked(generator, batch, i, j), _image(batch, i))


def _turns(generator, batch, task):
    """Two questions on each picture, one after the other."""
    first, second = generator.unit(BATCH, QUESTIONS).argsort(1)[:, :2].T
    for i in range(BATCH):
        before = (_asked(generator, batch, i, first[i]),)
        yield Example(
            task, *_asked(generator, batch, i, second[i]), _image(batch, i), before=before
        )


def _pairs(generator, batch, task):
    """A question on the first or on the second of two pictures."""
    order = generator.unit(BATCH).argsort()
    which, question = generator.integer(0, 2, BATCH), generator.integer(0, QUESTIONS, BATCH)
    for i in range(0, BATCH, 2):
        pictures = order[i : i + 2].tolist()
        asked, answer = _asked(generator, batch, pictures[which[i]], question[i])
        first, second = (_image(batch, k) for k in pictures)
        yield Example(task, PICTURES[which[i]] + asked, answer, first, second)


def write(out, rows):
    """Write examples as PNG files and ``qa.jsonl`` into the directory `out`."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    with open(out / "qa.jsonl", "w", encoding="utf-8") as lines:
        for i, row in enumerate(rows):
            record = {"task": row.task, "question": row.question, "answer": row.answer}
            for key, image in zip(("image", "second"), row.images, strict=False):
                record[key] = f"images/{row.task}_{i:05d}{'_2' * (key == 'second')}.png"
                image.save(out / record[key], optimize=True)
            if row.before:
                record["before"] = row.before
            lines.write(json.dumps(record) + "\n")


def read(directory):
    """Read what `write` has written."""
    directory = Path(directory)
    with open(directory / "qa.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    for record in records:
        for key in {"image", "second"} & record.keys():
            record[key] = Image.open(directory / record[key]).convert("RGB")
        record["before"] = tuple(map(tuple, record.get("before", ())))
    return [Example(**record) for record in records]


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=ALL_TASKS, default=TASKS)
    parser.add_argument("--noise", type=float, default=0.0)
    args = parser.parse_args()
    write(args.out, examples(args.split, args.seed, args.count, args.tasks, args.noise))


if __name__ == "__main__":
    main()
