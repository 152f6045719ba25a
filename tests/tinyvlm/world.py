"""The closed world of the tiny model: its characters, fonts, words, questions and tokenizer.

``python -m tests.tinyvlm.world FONT_DIR OUT_DIR`` renders the glyph atlas and builds the tokenizer,
the two files in ``assets/``.  FONT_DIR holds the unpacked Debian packages fonts-dejavu-core, -extra
(Bitstream Vera licence), fonts-liberation2 (OFL), fonts-roboto-unhinted (Apache-2.0) and fonts-lato
(OFL); only rendered bitmaps are kept.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).parent / "assets"

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSansCondensed",
    "LiberationSans-Regular", "LiberationSans-Bold", "LiberationSerif-Bold",
    "LiberationMono-Regular", "LiberationMono-Bold",
    "Roboto-Regular", "Roboto-Medium", "Lato-Regular", "Lato-Bold",
)  # fmt: skip
SIZES = range(12, 20)  # pixels
CELL = 24  # a glyph's bitmap is CELL x CELL, with its pen at PEN
PEN = (3, 18)
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz:.-"
GLYPH = {c: i + 1 for i, c in enumerate(CHARACTERS)}  # glyph 0 is empty

IMAGE_SIZE = 336
PATCH = 14
DIGITS = "0123456789"
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # no I, O, Q: too close to 1 and 0
KEYS = (
    "Total Date Code Name Item Ref Tax Qty Price Room Seat Gate Flight Order Phone Zip Unit Batch "
    "Lot Model Serial Table Desk Port Zone Plan Badge Case File Page Dose Rate Ship Card Pin Level "
    "Block Track Shelf Slot"
).split()
COLOURS = {
    "red": (210, 30, 30), "green": (20, 150, 50), "blue": (40, 80, 220),
    "orange": (240, 140, 10), "purple": (140, 40, 170), "black": (25, 25, 25),
}  # fmt: skip
PLURALS = {
    "circle": "circles", "square": "squares", "triangle": "triangles",
    "diamond": "diamonds", "cross": "crosses", "shape": "shapes",
}  # fmt: skip
SHAPES = tuple(PLURALS)[:5]
GRID = 4  # shapes stand in GRID x GRID cells
MAX_LINES = 8
MAX_LENGTH = 8  # of a value, in characters
MAX_BARS = 6
MAX_VALUE = 20  # of a bar
LABELS = tuple(key for key in KEYS if len(key) <= 4)  # that stand below bars

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
BOS, EOS, PAD, IMAGE = 1, 2, 3, 4
LINE_FEED = 203  # it ends a question and stands between two pictures

# The questions, in the order in which the generator indexes them.
FIELD_QUESTIONS = [f"What is the {key.lower()}?" for key in KEYS]
LINE_QUESTIONS = [f"Read line {i + 1}." for i in range(MAX_LINES)]
COUNT_QUESTIONS = [f"How many {c} {things}?" for c in COLOURS for things in PLURALS.values()]
CELL_QUESTIONS = [
    f"What is in row {r + 1} column {c + 1}?" for r in range(GRID) for c in range(GRID)
]
WHERE_QUESTIONS = [f"Where is the {c} {s}?" for c in COLOURS for s in SHAPES]
BAR_QUESTIONS = [f"What is the value of bar {letter}?" for letter in LETTERS]
VALUE_QUESTIONS = [f"What is the value of {label.lower()}?" for label in LABELS]
BARN_QUESTIONS = [f"Read bar {i + 1}." for i in range(MAX_BARS)]

# The answers that are not spelled out character by character.
KEY_ANSWERS = [f"{key}:" for key in KEYS]
THINGS = [f"{c} {s}" for c in COLOURS for s in SHAPES]
PLACES = [f"row {r + 1} column {c + 1}" for r in range(GRID) for c in range(GRID)]
NUMBERS = [str(i) for i in range(MAX_VALUE + 1)]
NOTHING = "nothing"

PICTURES = ("Image 1: ", "Image 2: ")  # before a question, where a prompt has two pictures


def build_tokenizer(path):
    """Train the byte-level BPE on all questions and answers and write it to `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = FIELD_QUESTIONS + LINE_QUESTIONS + COUNT_QUESTIONS + CELL_QUESTIONS + WHERE_QUESTIONS
    corpus += BAR_QUESTIONS + [f"{key} 1" for key in KEY_ANSWERS] + PLACES + 20 * [NOTHING] + THINGS
    tokenizer.train_from_iterator(corpus, trainer)
    # Capital letters stay single tokens after a space too, so that "bar K" and a value's "K" share
    # one embedding ("Ġ" is how a byte-level vocabulary writes the space).
    state = json.loads(tokenizer.to_str())
    merges = state["model"]["merges"]
    state["model"]["merges"] = [m for m in merges if not (m[0] == "Ġ" and m[1].isupper())]
    Path(path).write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")


def build_atlas(font_dir, path):
    """Render every character in every font and size and write bitmaps and advances to `path`."""
    files = {file.stem: file for file in Path(font_dir).rglob("*.ttf")}
    shape = (len(FONTS), len(SIZES), len(CHARACTERS) + 1)
    atlas = np.zeros((*shape, CELL, CELL), np.uint8)
    advance = np.zeros(shape, np.float32)
    for i, name in enumerate(FONTS):
        for j, size in enumerate(SIZES):
            font = ImageFont.truetype(files[name], size)
            for character, glyph in GLYPH.items():
                bitmap = Image.new("L", (CELL, CELL))
                ImageDraw.Draw(bitmap).text(PEN, character, fill=255, font=font, anchor="ls")
                atlas[i, j, glyph] = np.asarray(bitmap)
                advance[i, j, glyph] = font.getlength(character)
    np.savez_compressed(path, atlas=atlas, adv=advance)


if __name__ == "__main__":
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    build_atlas(sys.argv[1], out / "atlas.npz")
    build_tokenizer(out / "tokenizer.json")
