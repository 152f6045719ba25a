"""Checkpoint directories of real shape without weights, for ``--load-format dummy``.

Speed depends on shapes and not on the values of weights, so a benchmark needs no download: a
directory has the configuration of the published model, a byte tokenizer and the model's own image
processor.  Sources of the shapes: the models' ``config.json`` files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TILE = 448

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

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}IMAGE{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
)


def byte_tokenizer(special: dict[str, str] | list[str], **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, and special ones, which may have names."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokens = [BOS, EOS, PAD, *(special.values() if isinstance(special, dict) else special)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
        **options,
    )


def _internvl(name: str, directory: Path, max_length: int) -> None:
    tokenizer = byte_tokenizer(INTERNVL_TOKENS)
    hidden, mlp, layers, heads, kv_heads, vocab = INTERNVL_TEXT[name]
    v_hidden, v_mlp, v_layers, v_heads = INTERNVL_VISION[name]
    config = InternVLConfig(
        vision_config={
            "hidden_size": v_hidden,
            "intermediate_size": v_mlp,
            "num_hidden_layers": v_layers,
            "num_attention_heads": v_heads,
            "image_size": [TILE, TILE],
            "patch_size": [14, 14],
            "attention_bias": name != "internvl2.5-26b",
            "use_qk_norm": name == "internvl2.5-26b",
        },
        text_config=Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    config.architectures = ["InternVLForConditionalGeneration"]
    size = {"height": TILE, "width": TILE}
    InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=256,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    ).save_pretrained(directory)
    config.save_pretrained(directory)


def _llava(directory: Path, max_length: int) -> None:
    tokenizer = byte_tokenizer({"image_token": "<image>"})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=max_length),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    size = {"height": 336, "width": 336}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    ).save_pretrained(directory)
    config.save_pretrained(directory)


def make_model(name: str, directory: Path | str, max_length: int = 32768) -> Path:
    """Write a directory that vLLM loads with ``--load-format dummy``.

    Parameters
    ----------
    name
        One of :data:`NAMES`; ``internvl-tiny`` is for trying things without a GPU.
    directory
        Created if missing.
    max_length
        Positions of the language model.

    Returns
    -------
    Path
        ``directory``.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if name in INTERNVL_TEXT:
        _internvl(name, directory, max_length)
    elif name == "llava-1.5-7b":
        _llava(directory, max_length)
    else:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(NAMES)}")
    # Dummy weights sample any token; a stop token must not end a request early.
    (directory / "generation_config.json").write_text(json.dumps({}), encoding="utf-8")
    return directory


def image_placeholder(name: str) -> str:
    """What a prompt has in the place of an image."""
    return "<image>" if name.startswith("llava") else "<IMG_CONTEXT>"


def noise_image(name: str, seed: int, tiles: tuple[int, int] = (4, 3)) -> Image.Image:
    """An image of so many tiles across and down, or of 336 x 336 for models without tiles.

    Twelve tiles are the most that the models take; they add a small copy of the whole image.
    """
    across, down = tiles
    width, height = (336, 336) if name.startswith("llava") else (across * TILE, down * TILE)
    # Few distinct pixels suffice to tell images apart, and keep the making of them cheap.
    small = Image.effect_noise((32, 32), 60 + seed % 40).convert("RGB")
    small.putpixel((0, 0), (seed % 256, seed // 256 % 256, 7))
    return small.resize((width, height), Image.Resampling.NEAREST)
