"""Questions on images with known answers: of the tiny model, a file, or a name of ``datasets``."""

from __future__ import annotations

import io
import json
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

QUESTIONS = ("question", "query")
ANSWERS = ("answers", "answer", "label")
"""Columns, in order of preference; ChartQA has ``query`` and ``label``, DocVQA and TextVQA have
``question`` and ``answers``."""

Chat = list[dict[str, Any]]
"""Messages of a chat, as vLLM's ``LLM.chat`` takes them, with images as they are."""

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA's authors append to questions of these data sets, so that exact match means much."""


@dataclass(frozen=True)
class Row:
    """One question on an image, or on several, or in a later turn of a chat."""

    task: str
    question: str
    answers: tuple[str, ...]
    """Any of them is right."""
    image: Image.Image
    loose: bool = False
    """Whether case, spaces and a full stop at the end do not count."""
    more: tuple[Image.Image, ...] = ()
    """Images behind the first."""
    before: tuple[tuple[str, str], ...] = ()
    """Questions and answers of earlier turns; the images belong to the first."""

    @property
    def chat(self) -> Chat:
        """The chat that asks the question."""
        return chat(self.images, self.question, self.before)

    def look(self, question: str) -> Chat:
        """The chat before this one on the same images: its last turn, or another question."""
        if self.before:
            *before, (question, _) = self.before
            return chat(self.images, question, before)
        return chat(self.images, question)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images, in the order of the prompt."""
        return (self.image, *self.more)

    def is_right(self, text: str) -> bool:
        """Whether an answer is one of the true ones, exactly."""
        return self._plain(text) in map(self._plain, self.answers)

    def _plain(self, text: str) -> str:
        if not self.loose:
            return text.strip()
        return " ".join(text.casefold().split()).removesuffix(".")

    @cached_property
    def image_hash(self) -> bytes:
        """Equal for equal first images, which the prefix cache would find."""
        return sha256(self.image.tobytes()).digest()


def chat(
    images: Iterable[Image.Image], question: str, before: Iterable[tuple[str, str]] = ()
) -> Chat:
    """Messages with the images in the first, and the question as the last."""
    content: list[dict[str, Any]] = [{"type": "image_pil", "image_pil": i} for i in images]
    messages: Chat = []
    for asked, answer in before:
        content.append({"type": "text", "text": asked})
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
        content = []
    return [*messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]


PART = 50
"""Questions of each task in a part, which is what processes draw, ask and report at a time."""


def tiny_rows(
    count: int, seed: int, split: str = "test", tasks: Iterable[str] | None = None
) -> list[Row]:
    """Questions of ``tests/tinyvlm``, ``count`` of each task, of all tasks unless given."""
    from tests.tinyvlm.dataset import ALL_TASKS, examples

    return [
        Row(
            row.task,
            row.question,
            (row.answer,),
            row.image,
            more=row.images[1:],
            before=row.before,
        )
        for row in examples(split, seed, count, tuple(tasks or ALL_TASKS))
    ]


class Parts:
    """Questions in parts of :data:`PART` a task, in files that other processes may be writing."""

    def __init__(self, folder: Path, files: list[list[str]]) -> None:
        self.folder, self.files = folder, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Row]:
        """Rows of a part; waits for its files."""
        rows: list[Row] = []
        for name in self.files[index]:
            path = self.folder / name
            while not path.exists():
                time.sleep(0.1)
            found = pickle.loads(path.read_bytes())
            if isinstance(found, Exception):
                raise found
            rows += found
        return rows

    def write(self, name: str, rows: list[Row] | Exception) -> None:
        """Write a file of a part, or why there is none; a reader never sees half of it."""
        scratch = self.folder / f"{name}.new"
        scratch.write_bytes(pickle.dumps(rows))
        scratch.rename(self.folder / name)

    @classmethod
    def of(cls, rows: list[Row], folder: Path) -> Parts:
        """Parts of rows that are there."""
        taken: dict[str, int] = {}
        groups: dict[int, list[Row]] = {}
        for row in rows:
            taken[row.task] = taken.get(row.task, 0) + 1
            groups.setdefault((taken[row.task] - 1) // PART, []).append(row)
        parts = cls(folder, [[f"{i}.rows"] for i in range(len(groups))])
        for i, group in groups.items():
            parts.write(f"{i}.rows", group)
        return parts

    @classmethod
    def tiny(cls, count: int, seed: int, split: str, folder: Path, pool: Executor) -> Parts:
        """Parts of the tiny reader's questions, drawn by a pool; each part has a seed of its own.

        The first part is :func:`tiny_rows` of the same seed, the next that of the next seed.
        """
        from tests.tinyvlm.dataset import ALL_TASKS

        sizes = [min(PART, count - start) for start in range(0, count, PART)]
        parts = cls(folder, [[f"{i}-{task}.rows" for task in ALL_TASKS] for i in range(len(sizes))])
        for i, size in enumerate(sizes):
            for task, name in zip(ALL_TASKS, parts.files[i], strict=True):
                pool.submit(_draw, parts, name, size, seed + i, split, task)
        return parts


def _draw(parts: Parts, name: str, count: int, seed: int, split: str, task: str) -> None:
    try:
        parts.write(name, tiny_rows(count, seed, split, (task,)))
    except Exception as error:
        parts.write(name, error)  # for whoever waits


def load_rows(source: str, count: int, suffix: str = SHORT_ANSWER) -> list[Row]:
    """Rows of a JSONL file, or of anything that ``datasets`` loads.

    Parameters
    ----------
    source
        ``FILE.jsonl`` with ``image`` (a path relative to the file), ``question``, ``answer`` or
        ``answers`` and, if there are several, ``task``; or ``NAME[:CONFIG[:SPLIT]]`` for
        ``datasets``, where the name may be a directory and the split is ``validation`` if left
        out: ``HuggingFaceM4/ChartQA::test``, ``lmms-lab/DocVQA:DocVQA``, ``lmms-lab/textvqa``.
    count
        Rows of each task at most.
    suffix
        Appended to every question.

    Raises
    ------
    ValueError
        If there is no row, or a row lacks a column.
    """
    if source.endswith(".jsonl"):
        name, records = Path(source).stem, _jsonl(Path(source))
    else:
        name, records = _datasets(source)
        records = islice(records, count)
    taken: dict[str, int] = {}
    rows = []
    for record in records:
        task = str(record.get("task", name))
        taken[task] = taken.get(task, 0) + 1
        if taken[task] <= count:
            rows.append(_row(record, task, suffix))
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield {**record, "image": path.parent / record["image"]}


def _datasets(source: str) -> tuple[str, Iterator[dict[str, Any]]]:
    import datasets

    name, config, split = [*source.split(":"), "", ""][:3]
    # Streamed: a few hundred rows need no download of the whole set.
    rows = datasets.load_dataset(name, config or None, split=split or "validation", streaming=True)
    return Path(name).name, iter(rows)


def _row(record: Mapping[str, Any], task: str, suffix: str) -> Row:
    def column(names: tuple[str, ...]) -> Any:
        for name in names:
            if record.get(name) is not None:
                return record[name]
        raise ValueError(f"a row of {task} has no {' or '.join(names)}; it has {list(record)}")

    answers = column(ANSWERS)
    answers = (answers,) if isinstance(answers, str) else tuple(map(str, answers))
    image = column(("image",))
    if isinstance(image, Mapping):  # an encoded image of `datasets`
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    return Row(task, f"{column(QUESTIONS)}{suffix}", answers, image.convert("RGB"), loose=True)


def batches(rows: list[Row], size: int) -> list[list[int]]:
    """Indices of rows in batches without two questions on one image.

    A second question would find the image in the prefix cache where it has to be cold.
    """
    unfilled: list[dict[bytes, int]] = []
    filled: list[dict[bytes, int]] = []
    for i, row in enumerate(rows):
        batch = next((b for b in unfilled if row.image_hash not in b), None)
        if batch is None:
            unfilled.append(batch := {})
        batch[row.image_hash] = i
        if len(batch) == size:
            unfilled.remove(batch)
            filled.append(batch)
    return [list(batch.values()) for batch in filled + unfilled]


def other_questions(rows: list[Row]) -> list[str]:
    """For each row, another question of its task: what was asked about the image before."""
    others = []
    for i, row in enumerate(rows):
        rest = rows[i + 1 :] + rows[:i]
        same_task = (r.question for r in rest if r.task == row.task)
        others.append(next((q for q in same_task if q != row.question), "What is this?"))
    return others
