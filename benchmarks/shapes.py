"""Shapes of published models, from their ``config.json`` files; importing them costs nothing."""

# Hidden size, MLP size, layers, query heads, KV heads, vocabulary of the language models.
INTERNVL_TEXT = {
    "internvl3-8b": (3584, 18944, 28, 28, 4, 151674),
    "internvl2.5-26b": (6144, 16384, 48, 48, 8, 92553),
    "internvl-tiny": (256, 512, 2, 4, 2, 512),
}
# Hidden size, MLP size, layers, heads of the image towers.
INTERNVL_VISION = {
    "internvl3-8b": (1024, 4096, 24, 16),
    "internvl2.5-26b": (3200, 12800, 45, 25),
    "internvl-tiny": (64, 128, 2, 2),
}
NAMES = (*INTERNVL_TEXT, "llava-1.5-7b")
