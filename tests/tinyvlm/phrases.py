"""Batches of token sequences of different lengths."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .world import PAD


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

    @classmethod
    def cat(cls, parts):
        """Join batches of phrases along their first dimension."""
        width = max(part.ids.shape[-1] for part in parts)
        ids = [F.pad(part.ids, (0, width - part.ids.shape[-1]), value=PAD) for part in parts]
        return cls(torch.cat(ids), torch.cat([part.length for part in parts]))

    def take(self, index):
        """Return the phrases at `index`, which is any index of a tensor."""
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
