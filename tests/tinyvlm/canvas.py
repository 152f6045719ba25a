"""Drawing primitives on batches of images: text from the glyph atlas, boxes, layers of paint."""

import numpy as np
import torch

from .world import ASSETS, CELL, CHARACTERS, IMAGE_SIZE, PATCH, PEN, SIZES

PATCHES = IMAGE_SIZE // PATCH  # in a row of the image
CAP_HEIGHT = 0.36  # half the height of a capital, in units of the font size


class Canvas:
    """The glyph atlas and the pixel grid on one device.

    Masks ("alpha") are float [B, H, W] in 0..1, images float [B, 3, H, W], colours float [B, 3].
    """

    def __init__(self, device):
        self.device = device
        stored = np.load(ASSETS / "atlas.npz")
        # [fonts * sizes * glyphs, CELL * CELL] uint8 and [fonts, sizes, glyphs] float
        self.atlas = torch.from_numpy(stored["atlas"]).to(device).flatten(0, 2).flatten(1)
        self.advance = torch.from_numpy(stored["adv"]).to(device)
        self.cell = torch.arange(CELL, device=device)
        pixels = torch.arange(IMAGE_SIZE, device=device).float()
        self.x = pixels.view(1, 1, -1)
        self.y = pixels.view(1, -1, 1)

    def text(self, glyphs, font, size, x, y):
        """Draw glyphs with their pens at (x, y).

        Parameters
        ----------
        glyphs, font, size : int64 [B, N]
            Indices into CHARACTERS (plus one; 0 draws nothing), FONTS and SIZES.
        x, y : float [B, N]
            Pen and baseline, in pixels.

        Returns
        -------
        alpha : float [B, H, W]
        labels : int64 [B, PATCHES, PATCHES, 2]
            The glyph whose centre lies in the left and in the right half of each patch.
        """
        batch = glyphs.shape[0]
        bitmap = self.atlas[(font * len(SIZES) + size) * (len(CHARACTERS) + 1) + glyphs]
        left, top = x.round().long() - PEN[0], y.round().long() - PEN[1]
        columns = (left[..., None] + self.cell).clamp(0, IMAGE_SIZE - 1)  # [B, N, CELL]
        rows = (top[..., None] + self.cell).clamp(0, IMAGE_SIZE - 1)
        pixel = rows[..., :, None] * IMAGE_SIZE + columns[..., None, :]
        alpha = torch.zeros(batch, IMAGE_SIZE**2, device=self.device)
        coverage = (bitmap.float() / 255).view(batch, -1)
        alpha.scatter_reduce_(1, pixel.view(batch, -1), coverage, "amax")

        centre_x = x + self.advance[font, size, glyphs] / 2
        centre_y = y - CAP_HEIGHT * (size + SIZES[0])
        half = (centre_x / (PATCH // 2)).long().clamp(0, 2 * PATCHES - 1)
        row = (centre_y / PATCH).long().clamp(0, PATCHES - 1)
        labels = torch.zeros(batch, 2 * PATCHES**2, dtype=torch.long, device=self.device)
        labels.scatter_reduce_(1, row * 2 * PATCHES + half, glyphs, "amax")
        return alpha.view(batch, IMAGE_SIZE, IMAGE_SIZE), labels.view(batch, PATCHES, PATCHES, 2)

    def box(self, left, top, right, bottom):
        """Return the mask of one box per image; the edges are float [B]."""
        left, top, right, bottom = (edge.view(-1, 1, 1) for edge in (left, top, right, bottom))
        inside = (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)
        return inside.float()

    @staticmethod
    def fill(colour):
        """Return images of one colour each."""
        return colour[:, :, None, None].expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)

    @staticmethod
    def paint(image, alpha, colour):
        """Lay a colour ([B, 3] or [B, 3, H, W]) over the images where the mask says so."""
        alpha = alpha[:, None]
        if colour.ndim == 2:
            colour = colour[:, :, None, None]
        return image * (1 - alpha) + colour * alpha
