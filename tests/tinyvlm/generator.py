"""Batched synthetic documents, grids of shapes and bar charts, each image with ten questions.

Every draw comes from one ``torch.Generator``, so (device, seed, order and size of the batches)
fixes the data.  The order of the draws below is therefore part of the data sets: keep it.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from . import world
from .canvas import CAP_HEIGHT, PATCHES, Canvas
from .phrases import Phrases
from .world import GLYPH, GRID, IMAGE_SIZE, MAX_BARS, MAX_LENGTH, MAX_LINES, PATCH, SIZES

TASKS = ("field", "line", "count", "cell", "where", "bar", "barn", "value")
QUESTIONS = 10  # of each image
CELL_SIZE = IMAGE_SIZE // GRID
CELLS = GRID**2
LABEL_LENGTH = max(map(len, world.LABELS))
VALUE_CHARACTERS = world.DIGITS + world.LETTERS


@dataclass(frozen=True)
class Batch:
    """Images with their questions.

    Attributes
    ----------
    images : uint8 [B, 3, H, W]
    question, answer : Phrases [B, QUESTIONS]
    task : int64 [B, QUESTIONS]
        Index into TASKS.
    value : int64 [B, QUESTIONS]
        1 + the value of the bar that a question names; 0 where it names none.
    labels : int64 [B, PATCHES, PATCHES, 3]
        For the auxiliary loss: the glyph centred in the left and the right half of a patch, and 1 +
        the value of the bar whose letter stands in the patch.
    """

    images: torch.Tensor
    question: Phrases
    answer: Phrases
    task: torch.Tensor
    value: torch.Tensor
    labels: torch.Tensor


class Generator:
    """Source of random batches on one device."""

    def __init__(self, seed=0, device="cpu"):
        self.device = device
        self.random = torch.Generator(device=device).manual_seed(seed)
        self.canvas = Canvas(device)
        self.tokenizer = Tokenizer.from_file(str(world.ASSETS / "tokenizer.json"))

        def encode(text):
            return self.tokenizer.encode(text).ids

        def table(texts, end=""):
            return Phrases.table([encode(text + end) for text in texts], device)

        self.questions = {
            "field": table(world.FIELD_QUESTIONS, "\n"),
            "line": table(world.LINE_QUESTIONS, "\n"),
            "count": table(world.COUNT_QUESTIONS, "\n"),
            "cell": table(world.CELL_QUESTIONS, "\n"),
            "where": table(world.WHERE_QUESTIONS, "\n"),
            "bar": table(world.BAR_QUESTIONS, "\n"),
            "barn": table(world.BARN_QUESTIONS, "\n"),
            "value": table(world.VALUE_QUESTIONS, "\n"),
        }
        self.key_answers = table(world.KEY_ANSWERS)
        self.thing_answers = table([*world.THINGS, world.NOTHING])
        self.place_answers = table(world.PLACES)
        self.number_answers = table(world.NUMBERS)
        self.space = table([" "])
        self.picture_names = table(world.PICTURES)
        glyph_tokens = [world.PAD] + [encode(c)[0] for c in world.CHARACTERS]
        self.token_of_glyph = torch.tensor(glyph_tokens, device=device)

        def glyphs(text, width=0):
            return [GLYPH[c] for c in text] + [0] * (width - len(text))

        self.value_glyphs = torch.tensor(glyphs(VALUE_CHARACTERS), device=device)
        keys = [glyphs(answer, MAX_LENGTH) for answer in world.KEY_ANSWERS]
        self.key_glyphs = torch.tensor(keys, device=device)  # [keys, 8]
        labels = [glyphs(label, LABEL_LENGTH) for label in (*world.LETTERS, *world.LABELS)]
        self.label_glyphs = torch.tensor(labels, device=device)
        self.label_answers = table([*world.LETTERS, *(f"{label}:" for label in world.LABELS)])
        self.colours = torch.tensor(list(world.COLOURS.values()), device=device).float() / 255

    def unit(self, *shape):
        """Draw floats in [0, 1)."""
        return torch.rand(*shape, generator=self.random, device=self.device)

    def uniform(self, low, high, *shape):
        """Draw floats in [low, high)."""
        return low + (high - low) * self.unit(*shape)

    def integer(self, low, high, *shape):
        """Draw integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.random, device=self.device)

    def arange(self, n):
        """Count from 0 to n - 1."""
        return torch.arange(n, device=self.device)

    def palette(self, n):
        """Draw light backgrounds and dark foregrounds ([n, 3] each); one in eight is inverted."""
        light = self.uniform(0.82, 1, n, 3)
        light = torch.where(self.unit(n, 1) < 0.4, torch.ones_like(light), light)
        dark = self.uniform(0, 0.35, n, 3)
        dark = torch.where(self.unit(n, 1) < 0.4, torch.zeros_like(dark), dark)
        swap = self.unit(n, 1) < 0.12
        return torch.where(swap, dark, light), torch.where(swap, light, dark)

    def documents(self, n, max_lines=MAX_LINES, min_length=4, max_length=MAX_LENGTH):
        """Draw forms of three to eight lines "Key: value"; ask for fields and whole lines."""
        lines = self.integer(min(3, max_lines), max_lines + 1, n)
        key = self.unit(n, len(world.KEYS)).argsort(1)[:, :MAX_LINES]
        value, length = self._values(n, min_length, max_length)
        live = self.arange(MAX_LINES) < lines[:, None]
        value = value * live[..., None]
        key_text = self.key_glyphs[key] * live[..., None]

        key_font, value_font = (self.integer(0, len(world.FONTS), n) for _ in range(2))
        value_font = torch.where(self.unit(n) < 0.5, key_font, value_font)
        size = self.integer(1, len(SIZES), n)
        pixels = size + SIZES[0]

        def per_glyph(t):
            return t[:, None, None].expand(n, MAX_LINES, MAX_LENGTH)

        advance = self.canvas.advance
        key_advance = advance[per_glyph(key_font), per_glyph(size), key_text]  # [n, 8, 8]
        value_advance = advance[per_glyph(value_font), per_glyph(size), value]
        key_width, value_width = key_advance.sum(-1), value_advance.sum(-1)  # [n, 8]

        # Values follow their key, stand in one column, or are flush right; none leaves the image.
        left = self.uniform(4, 40, n)[:, None]
        left = left + self.unit(n, MAX_LINES) * (self.unit(n, 1) < 0.3) * 8
        gap = self.uniform(0.25, 0.7, n)[:, None] * pixels[:, None]
        inline = left + key_width + gap
        column = inline.masked_fill(~live, 0).amax(1, keepdim=True).expand(n, MAX_LINES)
        inset = self.uniform(0, 1, n)[:, None]
        style = self.integer(0, 3, n)[:, None]
        room = IMAGE_SIZE - 5 - value_width
        value_left = torch.where(style == 0, inline, room - inset * 6)
        value_left = torch.maximum(torch.minimum(value_left, room), inline.minimum(room))
        value_left = torch.where(style == 1, torch.minimum(column, room), value_left)
        value_left = torch.maximum(value_left, torch.minimum(left + key_width + 2, room))

        pitch = torch.minimum(pixels + self.uniform(4, 26, n), (IMAGE_SIZE - 14) / lines.float())
        top = self.uniform(0, 1, n) * (IMAGE_SIZE - 8 - pitch * lines).clamp(min=0) + 2
        baseline = top[:, None] + pitch[:, None] * self.arange(MAX_LINES)
        baseline = baseline + (pitch * 0.5 + pixels * CAP_HEIGHT)[:, None]

        def keys_and_values(of_keys, of_values):
            return torch.cat([of_keys.reshape(n, -1), of_values.reshape(n, -1)], 1)

        y = baseline[..., None].expand(n, MAX_LINES, MAX_LENGTH)
        text, labels = self.canvas.text(
            keys_and_values(key_text, value),
            keys_and_values(per_glyph(key_font), per_glyph(value_font)),
            keys_and_values(per_glyph(size), per_glyph(size)),
            keys_and_values(
                left[..., None] + key_advance.cumsum(-1) - key_advance,
                value_left[..., None] + value_advance.cumsum(-1) - value_advance,
            ),
            keys_and_values(y, y),
        )
        paper, ink = self.palette(n)
        image = self.canvas.fill(paper)
        decoration = self._decoration(top, pitch, lines)
        image = self.canvas.paint(image, decoration, 0.6 * paper + 0.4 * ink)
        image = self.canvas.paint(image, text, ink)

        row = self.arange(n)[:, None]
        line = (self.unit(n, QUESTIONS) * lines[:, None]).long()
        is_line = self._last_two_of_five(n)
        asked_key = self.questions["field"].take(key[row, line])
        question = self.questions["line"].take(line).where(is_line, asked_key)
        spelled = Phrases(self.token_of_glyph[value[row, line]], length[row, line])
        space = self.space.take(torch.zeros_like(line))
        whole_line = self.key_answers.take(key[row, line]).then(space).then(spelled)
        answer = whole_line.where(is_line, spelled)
        return image, labels, question, answer, is_line.long(), torch.zeros_like(line)

    def _values(self, n, min_length, max_length):
        """Draw values: digits, letters, both, digits with a decimal point or with a dash.

        Returns glyphs, int64 [n, 8, 8] with 0 behind the end, and lengths, int64 [n, 8].
        """
        length = self.integer(min_length, max_length + 1, n, MAX_LINES)
        kind = self.integer(0, 5, n, MAX_LINES)[..., None]
        shape = (n, MAX_LINES, MAX_LENGTH)
        digits = self.integer(0, 10, *shape)
        letters = self.integer(10, len(VALUE_CHARACTERS), *shape)
        mixed = self.integer(0, len(VALUE_CHARACTERS), *shape)
        value = torch.where(kind == 1, letters, torch.where(kind == 2, mixed, digits))
        value = self.value_glyphs[value]
        position = self.arange(MAX_LENGTH)
        value = torch.where((kind == 3) & (position == length[..., None] - 3), GLYPH["."], value)
        value = torch.where((kind == 4) & (position == 2), GLYPH["-"], value)
        return value * (position < length[..., None]), length

    def _decoration(self, top, pitch, lines):
        """Draw zebra rows, ruled lines, a frame or nothing: a mask [n, H, W]."""
        n = len(lines)
        kind = self.integer(0, 4, n).view(-1, 1, 1)
        x, y = self.canvas.x, self.canvas.y
        pitch, lines = pitch.view(-1, 1, 1), lines.view(-1, 1, 1)
        at = (y - top.view(-1, 1, 1)) / pitch  # in lines
        zebra = (at >= 0) & (at < lines) & (at.floor() % 2 == 1) & (kind == 1)
        zebra = zebra.float().expand(n, IMAGE_SIZE, IMAGE_SIZE) * 0.15
        rules = ((at * pitch) % pitch < 1) & (at > -0.02) & (at < lines + 0.1) & (kind == 2)
        rules = rules.float().expand(n, IMAGE_SIZE, IMAGE_SIZE) * 0.6
        end = IMAGE_SIZE - 2
        frame = ((x < 2) | (x >= end) | (y < 2) | (y >= end)) & (kind == 3)
        return torch.maximum(torch.maximum(zebra, rules), frame.float() * 0.8)

    def _last_two_of_five(self, n):
        """Which of the ten questions are of a scene's rarer kind: bool [n, QUESTIONS]."""
        return (self.arange(QUESTIONS) % 5 >= 3).expand(n, QUESTIONS)

    def grids(self, n):
        """Draw up to sixteen shapes in a grid; ask for counts, for contents and for places."""
        density = self.uniform(0.25, 1, n, 1)
        # Few colours and shapes in an image make for larger counts.
        num_colours, num_shapes = self.integer(1, 7, n, 1), self.integer(1, 6, n, 1)
        colours = self.unit(n, len(world.COLOURS)).argsort(1)
        shapes = self.unit(n, len(world.SHAPES)).argsort(1)
        colour = colours.gather(1, (self.unit(n, CELLS) * num_colours).long())  # [n, 16]
        shape = shapes.gather(1, (self.unit(n, CELLS) * num_shapes).long())
        live = self.unit(n, CELLS) < density

        alpha = self._shape_masks(shape) * live[..., None, None]  # [n, 16, 84, 84]
        alpha = alpha.view(n, GRID, GRID, CELL_SIZE, CELL_SIZE).permute(0, 1, 3, 2, 4)
        alpha = alpha.reshape(n, IMAGE_SIZE, IMAGE_SIZE)
        tile = self.colours[colour].view(n, GRID, 1, GRID, 1, 3)
        tile = tile.expand(n, GRID, CELL_SIZE, GRID, CELL_SIZE, 3)
        tile = tile.reshape(n, IMAGE_SIZE, IMAGE_SIZE, 3).permute(0, 3, 1, 2)
        paper = self.uniform(0.85, 1, n, 3)
        paper = torch.where(self.unit(n, 1) < 0.5, torch.ones_like(paper), paper)
        image = self.canvas.paint(self.canvas.fill(paper), alpha, tile)
        rule = (self.canvas.x % CELL_SIZE < 1) | (self.canvas.y % CELL_SIZE < 1)
        rule = (rule & (self.unit(n) < 0.5).view(-1, 1, 1)).float() * 0.3
        image = self.canvas.paint(image, rule, torch.zeros_like(paper))

        kind = torch.tensor([2, 3, 4] * 3 + [2], device=self.device).expand(n, QUESTIONS)
        row = self.arange(n)[:, None]
        thing = colour * len(world.SHAPES) + shape  # index into THINGS, [n, 16]
        times = torch.zeros(n, len(world.THINGS), device=self.device)
        times.scatter_add_(1, thing, live.float())
        unique = live & (times.gather(1, thing) == 1)

        def pick(preferred):
            """Draw a cell for each question, one of the preferred if there is any."""
            return (self.unit(n, QUESTIONS, CELLS) + preferred[:, None].float() * 2).argmax(-1)

        any_cell = self.integer(0, CELLS, n, QUESTIONS)
        unique_cell, live_cell = pick(unique), pick(live)
        kind = torch.where((kind == 4) & ~unique[row, unique_cell], 3, kind)

        # One count in four is of a random pair (mostly 0), four in ten are of a colour alone.
        asked_colour, asked_shape = colour[row, live_cell], shape[row, live_cell]
        stray = self.unit(n, QUESTIONS) < 0.25
        asked_colour = torch.where(stray, self.integer(0, 6, n, QUESTIONS), asked_colour)
        asked_shape = torch.where(stray, self.integer(0, 5, n, QUESTIONS), asked_shape)
        asked_shape = torch.where(self.unit(n, QUESTIONS) < 0.4, len(world.SHAPES), asked_shape)
        fits = (shape[:, None] == asked_shape[..., None]) | (asked_shape == 5)[..., None]
        fits = fits & live[:, None] & (colour[:, None] == asked_colour[..., None])
        content = torch.where(live[row, any_cell], thing[row, any_cell], len(world.THINGS))

        is_count, is_cell = kind == 2, kind == 3
        question = self.questions["cell"].take(any_cell)
        question = question.where(is_cell, self.questions["where"].take(thing[row, unique_cell]))
        counted = self.questions["count"].take(asked_colour * len(world.PLURALS) + asked_shape)
        question = counted.where(is_count, question)
        answer = self.thing_answers.take(content)
        answer = answer.where(is_cell, self.place_answers.take(unique_cell))
        answer = self.number_answers.take(fits.sum(-1)).where(is_count, answer)
        labels = torch.zeros(n, PATCHES, PATCHES, 2, dtype=torch.long, device=self.device)
        return image, labels, question, answer, kind, torch.zeros_like(kind)

    def _shape_masks(self, shape):
        """Draw each cell's shape at a random place and size: [n, 16] -> [n, 16, 84, 84]."""
        n = len(shape)
        radius, middle = self.uniform(10, 30, n, CELLS), CELL_SIZE / 2
        x, y = (middle + (self.unit(n, CELLS) * 2 - 1) * (middle - 3 - radius) for _ in range(2))
        pixel = self.arange(CELL_SIZE).float() + 0.5
        u = (pixel - x[..., None])[..., None, :]
        v = (pixel - y[..., None])[..., :, None]
        r = radius[..., None, None]
        distance = (  # signed, in pixels, in the order of SHAPES
            torch.sqrt(u * u + v * v) - r,
            torch.maximum(u.abs(), v.abs()) - r * 0.86,
            torch.maximum(v - r * 0.75, (u.abs() - 0.514 * (v + r)) * 0.89),
            (u.abs() + v.abs()) * 0.75 - r * 0.85,
            torch.minimum(
                torch.maximum(u.abs() - r, v.abs() - r * 0.33),
                torch.maximum(v.abs() - r, u.abs() - r * 0.33),
            ),
        )
        shape = shape[..., None, None]
        return (0.5 - sum((shape == k) * d for k, d in enumerate(distance))).clamp(0, 1)

    def charts(self, n):
        """Draw bar charts of three to six bars; ask for the value of a label or of a position."""
        bars = self.integer(3, MAX_BARS + 1, n)
        letter = self.unit(n, len(world.LETTERS)).argsort(1)[:, :MAX_BARS]
        word = self.unit(n, len(world.LABELS)).argsort(1)[:, :MAX_BARS]
        has_words = self.unit(n, 1) < 0.5
        label = torch.where(has_words, len(world.LETTERS) + word, letter)  # [n, 6]
        highest = torch.where(self.unit(n) < 0.5, 10, 20)
        value = (self.unit(n, MAX_BARS) * (highest[:, None] + 1)).long()
        live = self.arange(MAX_BARS) < bars[:, None]
        left, right = self.uniform(28, 36, n), IMAGE_SIZE - self.uniform(4, 18, n)
        bottom, top = IMAGE_SIZE - self.uniform(22, 32, n), self.uniform(10, 28, n)
        pitch = (right - left) / bars
        width = pitch * self.uniform(0.45, 0.8, n)
        centre = left[:, None] + pitch[:, None] * (self.arange(MAX_BARS) + 0.5)  # [n, 6]
        paper, ink = self.palette(n)
        one_colour = self.unit(n, 1) < 0.5
        colour = torch.where(one_colour, self.integer(0, 5, n, 1), self.integer(0, 5, n, MAX_BARS))

        canvas = self.canvas
        image = canvas.fill(paper)
        rules = torch.where(self.unit(n) < 0.5, 2, 4)
        for i in range(5):
            y = (bottom - (bottom - top) * i / rules).round()
            rule = canvas.box(left, y, right, y + 1) * (i <= rules).view(-1, 1, 1).float()
            image = canvas.paint(image, rule * (1.0 if i == 0 else 0.4), ink)
        axis = canvas.box(left.round(), top, left.round() + 1, bottom + 1)
        image = canvas.paint(image, axis, ink)
        for i in range(MAX_BARS):
            y = bottom - (bottom - top) * value[:, i] / highest
            edges = (centre[:, i] - width / 2).round(), (centre[:, i] + width / 2).round()
            bar = canvas.box(edges[0], y.round(), edges[1], bottom.round())
            image = canvas.paint(image, bar * live[:, i].view(-1, 1, 1), self.colours[colour[:, i]])

        font, size = self.integer(0, len(world.FONTS), n), self.integer(1, 6, n)
        pixels = size + SIZES[0]
        glyphs = self.label_glyphs[label] * live[..., None]  # [n, 6, LABEL_LENGTH]
        advance = canvas.advance[font[:, None, None], size[:, None, None], glyphs]
        label_x = (centre - advance.sum(-1) / 2)[..., None] + advance.cumsum(-1) - advance
        label_y = (bottom + 4 + pixels * 0.75)[:, None].expand(n, MAX_BARS * LABEL_LENGTH)
        numbers, number_x, number_y = self._axis_numbers(highest, left, bottom, top, font, size)
        text, labels = canvas.text(
            torch.cat([glyphs.flatten(1), numbers], 1),
            *(t[:, None].expand(n, glyphs[0].numel() + numbers.shape[1]) for t in (font, size)),
            torch.cat([label_x.flatten(1), number_x], 1),
            torch.cat([label_y, number_y], 1),
        )
        image = canvas.paint(image, text, ink)

        # The tower is to know a bar's value wherever a glyph of its label is centred.
        patch_y = (label_y - CAP_HEIGHT * pixels[:, None]) / PATCH
        patch = patch_y.long().clamp(0, PATCHES - 1) * PATCHES
        patch_x = (label_x + advance / 2).flatten(1) / PATCH
        patch = patch + patch_x.long().clamp(0, PATCHES - 1)
        values = torch.zeros(n, PATCHES**2, dtype=torch.long, device=self.device)
        values.scatter_reduce_(1, patch, ((value + 1)[..., None] * (glyphs > 0)).flatten(1), "amax")
        labels = torch.cat([labels, values.view(n, PATCHES, PATCHES, 1)], -1)

        row = self.arange(n)[:, None]
        bar = (self.unit(n, QUESTIONS) * bars[:, None]).long()
        by_number = self._last_two_of_five(n)
        by_word = self.questions["value"].take(word[row, bar])
        by_name = by_word.where(has_words, self.questions["bar"].take(letter[row, bar]))
        question = self.questions["barn"].take(bar).where(by_number, by_name)
        number = self.number_answers.take(value[row, bar])
        name = self.label_answers.take(label[row, bar])
        named = name.then(self.space.take(torch.zeros_like(bar))).then(number)
        answer = named.where(by_number, number)
        task = torch.where(has_words, TASKS.index("value"), TASKS.index("bar"))
        task = torch.where(by_number, TASKS.index("barn"), task)
        hint = torch.where(by_number, 0, 1 + value[row, bar])
        return image, labels, question, answer, task, hint

    def _axis_numbers(self, highest, left, bottom, top, font, size):
        """Place 0, half of the highest value and the highest: glyphs, x and y, [n, 6] each."""
        n = len(highest)
        pixels = size + SIZES[0]
        two_digits = []
        for number in (torch.zeros_like(highest), highest // 2, highest):
            tens = torch.where(number >= 10, self.value_glyphs[number // 10], 0)
            two_digits.append(torch.stack([tens, self.value_glyphs[number % 10]], 1))
        glyphs = torch.stack(two_digits, 1).view(n, 6)
        advance = self.canvas.advance[font[:, None], size[:, None], glyphs].view(n, 3, 2)
        x = left[:, None, None] - 4 - advance.sum(-1, keepdim=True) + advance.cumsum(-1) - advance
        y = torch.stack([bottom - (bottom - top) * i / 2 for i in range(3)], 1)[..., None]
        y = y.expand(n, 3, 2).reshape(n, 6) + (pixels * CAP_HEIGHT)[:, None]
        return glyphs, x.view(n, 6), y

    @torch.no_grad()
    def batch(self, documents, grids, charts, noise=0.0, **document_options):
        """Draw that many images of each scene.

        Parameters
        ----------
        documents, grids, charts : int
        noise : float
            Largest standard deviation of the white noise that four images in ten get.
        **document_options
            For `documents`.

        Returns
        -------
        Batch
        """
        scenes = []
        if documents:
            scenes.append(self.documents(documents, **document_options))
        if grids:
            scenes.append(self.grids(grids))
        if charts:
            scenes.append(self.charts(charts))
        image, labels, question, answer, task, value = zip(*scenes, strict=True)
        image = torch.cat(image)
        if noise:
            n = len(image)
            white = torch.randn(image.shape, generator=self.random, device=self.device)
            white = white * (self.unit(n, 1, 1, 1) < 0.4) * self.uniform(0, noise, n, 1, 1, 1)
            image = image + white
        labels = [torch.nn.functional.pad(part, (0, 3 - part.shape[-1])) for part in labels]
        return Batch(
            (image.clamp(0, 1) * 255).round().to(torch.uint8),
            Phrases.cat(question),
            Phrases.cat(answer),
            torch.cat(task),
            torch.cat(value),
            torch.cat(labels),
        )

    def text(self, phrase):
        """Return one phrase as a string, without the line feed of a question."""
        ids = phrase.ids[: phrase.length].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False).rstrip("\n")
