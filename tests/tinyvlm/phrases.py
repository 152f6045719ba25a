"""Batches of token sequences of different lengths; questions and answers become segments."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .world import EOS, PAD

SEGMENT = 19  # tokens: the longest question with its answer and the end token


class Phrases(NamedTuple):
    """Token rows, padded on the right, and their lengths.

    Attributes
    ----------
    ids : int64 [..., width]
    length : int64 [...]
    """

    ids: torch.Tensor
    length: torch.Tensor

    @classmethod
    def table(cls, rows, device):
        """Make a table of token lists that `take` looks up."""
        width = max(map(len, rows))
        ids = [row + [PAD] * (width - len(row)) for row in rows]
        return cls(
            torch.tensor(ids, device=device),
            torch.tensor([len(row) for row in rows], device=device),
        )

    def take(self, index):
        """Return the phrases at `index`, an int64 tensor of any shape."""
        return Phrases(self.ids[index], self.length[index])

    def then(self, other):
        """Return these phrases, each followed by the one of `other`."""
        width = self.ids.shape[-1] + other.ids.shape[-1]
        position = torch.arange(width, device=self.ids.device)
        behind = position - self.length[..., None]
        tail = other.ids.gather(-1, behind.clamp(0, other.ids.shape[-1] - 1))
        head = F.pad(self.ids, (0, width - self.ids.shape[-1]), value=PAD)
        return Phrases(torch.where(behind < 0, head, tail), self.length + other.length)

    def where(self, mask, other):
        """Return these phrases where `mask` (bool [...]) holds, those of `other` elsewhere."""
        width = max(self.ids.shape[-1], other.ids.shape[-1])
        mine, theirs = (
            F.pad(p.ids, (0, width - p.ids.shape[-1]), value=PAD) for p in (self, other)
        )
        return Phrases(
            torch.where(mask[..., None], mine, theirs),
            torch.where(mask, self.length, other.length),
        )


def segments(question, answer):
    """Lay question, answer and end token one after the other.

    Returns
    -------
    ids : int64 [..., SEGMENT]
    is_answer : bool [..., SEGMENT]
        True for the tokens that the model has to predict: the answer and the end token.
    """
    end = Phrases(torch.full_like(answer.ids[..., :1], EOS), torch.ones_like(answer.length))
    whole = question.then(answer.then(end))
    ids = F.pad(whole.ids, (0, SEGMENT), value=PAD)[..., :SEGMENT]
    position = torch.arange(SEGMENT, device=ids.device)
    is_answer = (position >= question.length[..., None]) & (position < whole.length[..., None])
    return torch.where(position < whole.length[..., None], ids, PAD), is_answer
