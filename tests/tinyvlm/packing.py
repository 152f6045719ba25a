"""Many questions in one training sequence, each trained as if it were the only one of its prompt.

A sequence is the prefix ``<s> picture 1 <line feed> picture 2`` and a row of slots behind it.  A
slot holds one turn, or two of which the second sees the first; it sees itself and either the whole
prefix or only ``<s> picture 1``, which is then a whole prompt: attention is causal, so what the
prefix is to the first picture does not depend on the second.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .phrases import Phrases
from .world import EOS, PAD

TURN = 19  # tokens: the longest question with its answer and the end token
NAMED_TURN = 26  # the same with the picture's name before the question


class Slot(NamedTuple):
    """Pictures that a slot sees, and its turns."""

    pictures: int
    turns: int

    @property
    def width(self):
        """Tokens."""
        return self.turns * (TURN if self.pictures == 1 else NAMED_TURN)


SLOTS = 6 * [Slot(1, 1)] + 2 * [Slot(1, 2)] + 10 * [Slot(2, 1)] + [Slot(2, 2)]
WIDTH = sum(slot.width for slot in SLOTS)  # tokens of all slots
# What an answer shows, in the order of the answers of a sequence.
KINDS = [
    ("one picture", "second turn", "two pictures", "two pictures, second turn")[
        2 * (slot.pictures - 1) + turn
    ]
    for slot in SLOTS
    for turn in range(slot.turns)
]
HINTED = 3  # "K", "?" and the line feed of "What is the value of bar K?"


def prefix_length(visual_tokens):
    """Tokens before the slots."""
    return 2 + 2 * visual_tokens


def layout(visual_tokens):
    """Lay the slots out.

    Returns
    -------
    position : int64 [L]
        Of each token in the prompt that it stands for; L is a multiple of 64.
    visible : bool [L - prefix, L]
        Which tokens those behind the prefix see.
    """
    prefix = prefix_length(visual_tokens)
    length = -(-(prefix + WIDTH) // 64) * 64
    position = torch.arange(length)
    visible = torch.eye(length, dtype=torch.bool)[prefix:]  # the rest is padding
    start = prefix
    for slot in SLOTS:
        seen = prefix if slot.pictures == 2 else 1 + visual_tokens
        end = start + slot.width
        position[start:end] = seen + torch.arange(slot.width)
        rows = visible[start - prefix : end - prefix]
        rows[:, :seen] = True
        rows[:, start:end] = torch.ones(slot.width, slot.width, dtype=torch.bool).tril()
        start = end
    return position, visible


class Packed(NamedTuple):
    """What is behind the prefixes, for n pairs of pictures.

    Attributes
    ----------
    tokens : int64 [n, WIDTH]
    answer : int64 [n, WIDTH]
        The answer that a token belongs to (its end token included), or -1.
    value : int64 [n, WIDTH]
        1 + the value of the bar that is asked for, at the last tokens of such questions, else 0.
    task : int64 [n, answers]
        Index into TASKS of each answer.
    """

    tokens: torch.Tensor
    answer: torch.Tensor
    value: torch.Tensor
    task: torch.Tensor


def pack(batch, generator):
    """Pair the pictures of a batch and fill the slots with their questions.

    Parameters
    ----------
    batch : Batch
        Of 2n pictures.
    generator : Generator
        Source of the draws.

    Returns
    -------
    order : int64 [2n]
        The pictures: n first ones, then their n second ones.
    packed : Packed
    """
    n, questions = len(batch.images) // 2, batch.task.shape[1]
    order = generator.unit(2 * n).argsort()
    unused = generator.unit(n, questions).argsort(1)  # of the first picture, without repetition
    slots, tasks = [], []
    for slot in SLOTS:
        turns = []
        for _ in range(slot.turns):
            if slot.pictures == 1:
                picture, question = order[:n], unused[:, len(tasks)]
                asked = batch.question.take((picture, question))
            else:
                which = (generator.unit(n) < 0.5).long()
                picture = order[which * n + generator.arange(n)]
                question = generator.integer(0, questions, n)
                asked = batch.question.take((picture, question))
                asked = generator.picture_names.take(which).then(asked)
            answer = batch.answer.take((picture, question))
            turns.append((asked, answer, batch.value[picture, question]))
            tasks.append(batch.task[picture, question])
        slots.append(_lay(turns, len(tasks) - slot.turns, slot.width))
    tokens, answer, value = (torch.cat(parts, 1) for parts in zip(*slots, strict=True))
    return order, Packed(tokens, answer, value, torch.stack(tasks, 1))


def _lay(turns, first_answer, width):
    """Lay the turns of a slot one behind the other: tokens, answers and values of `Packed`."""
    whole, ends = None, []
    for question, answer, _ in turns:
        end = Phrases(torch.full_like(answer.ids[:, :1], EOS), torch.ones_like(answer.length))
        asked = whole.then(question) if whole else question
        whole = asked.then(answer).then(end)
        ends.append((asked.length[:, None], whole.length[:, None]))
    tokens = F.pad(whole.ids, (0, width), value=PAD)[:, :width]
    position = torch.arange(width, device=tokens.device)
    number, hint = torch.full_like(tokens, -1), torch.zeros_like(tokens)
    for turn, (start, end) in enumerate(ends):
        number[(position >= start) & (position < end)] = first_answer + turn
        before = (position >= start - HINTED) & (position < start)
        hint = torch.where(before, turns[turn][2][:, None], hint)
    return torch.where(position < ends[-1][1], tokens, PAD), number, hint
