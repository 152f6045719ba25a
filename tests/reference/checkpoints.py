"""Tiny vision-language checkpoints with random weights, which transformers and vLLM both load.

Each style is a real architecture at toy size (two or three layers, byte vocabulary, a few MB), with
its own image processor, tokenizer, chat template and way of mixing image tokens with text:

===========  ======================================  =======  =====================================
style        architecture                            heads    what it adds
===========  ======================================  =======  =====================================
llava        LlavaForConditionalGeneration           4/2 x64  bare image tokens, CLIP tower
qwen2_5_vl   Qwen2_5_VLForConditionalGeneration      4/4 x64  M-RoPE, biased q/k/v, any image size
qwen3_vl     Qwen3VLForConditionalGeneration         8/2x128  other M-RoPE, QK norm, deepstack
internvl     InternVLForConditionalGeneration        4/1 x32  tiles, thumbnail, ``<img>`` markers
===========  ======================================  =======  =====================================

(heads: query/KV heads x head size.)  A checkpoint depends on its style, dtype and seed only, and
needs no network: ``python -m tests.reference.checkpoints llava DIRECTORY [dtype]`` writes one.

Default initialisation would make every comparison of outputs trivial: attention would be uniform
and all logits nearly equal.  :func:`_randomise` therefore scales the weights so that attention
scores spread over a few units, image tokens are as loud as text, and greedy choices are clear.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from benchmarks.models import INTERNVL_TOKENS, byte_tokenizer

QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SPECIAL_TOKENS: dict[str, dict[str, str] | list[str]] = {
    "llava": {"image_token": "<image>"},
    "qwen2_5_vl": QWEN_TOKENS,
    "qwen3_vl": QWEN_TOKENS,
    "internvl": INTERNVL_TOKENS,
}

MAX_LENGTH = 4096
# Standard deviation of a layer's attention scores, roughly: far from uniform, not yet one-hot.
SCORE_STD = 2.0
LOGIT_STD = 4.0
# With more context and less of the last token in the residual, greedy decoding repeats itself.
CONTEXT_GAIN = 0.5

# What a user writes in a prompt to place one image; each processor expands it to image tokens.
IMAGE_PLACEHOLDER = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}


def _chat_template(style: str) -> str:
    """Return a Jinja template that keeps images and text in the order of the message's parts."""
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] in ('image', 'image_url') %}"
        + IMAGE_PLACEHOLDER[style]
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _llava(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA-1.5: 256 tokens an image, CLIP features of the last but one layer, no class token."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=112,
            patch_size=7,
            projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
            **_ids(tokenizer),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=256,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    size = {"height": 112, "width": 112}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat_template("llava"),
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL: one token for each 2 x 2 patches of the image at its own size."""
    start, end, image, video = tokenizer.convert_tokens_to_ids(QWEN_TOKENS)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 256,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": MAX_LENGTH,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 12, 12],
            },
            **_ids(tokenizer),
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=_chat_template("qwen2_5_vl"),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL: as Qwen2.5-VL, with features of an early vision layer added inside the decoder."""
    start, end, image, video = tokenizer.convert_tokens_to_ids(QWEN_TOKENS)
    config = Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": MAX_LENGTH,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            **_ids(tokenizer),
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 512 * 512}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer,
        Qwen3VLVideoProcessor(size=size),
        chat_template=_chat_template("qwen3_vl"),
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _internvl(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, ProcessorMixin]:
    """InternVL: up to 4 tiles and a thumbnail of 64 tokens each, between two marker tokens."""
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [112, 112],
            "patch_size": [7, 7],
            "attention_bias": True,
        },
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
            **_ids(tokenizer),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(INTERNVL_TOKENS["context_image_token"]),
        image_seq_length=64,
        tie_word_embeddings=False,
        **_ids(tokenizer),
    )
    size = {"height": 112, "width": 112}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=64,
        chat_template=_chat_template("internvl"),
    )
    return InternVLForConditionalGeneration(config), processor


_BUILDERS: dict[
    str, Callable[[PreTrainedTokenizerFast], tuple[PreTrainedModel, ProcessorMixin]]
] = {
    "llava": _llava,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
}
STYLES = tuple(_BUILDERS)
# Chosen among a few dozen: the two best candidates of every greedy choice of the tests in
# test_reference.py differ by at least 0.003 in log-probability, and no answer repeats itself soon.
SEEDS = {"llava": 94, "qwen2_5_vl": 2, "qwen3_vl": 3, "internvl": 17}


@torch.no_grad()
def _randomise(model: PreTrainedModel, num_bytes: int, seed: int) -> None:
    """Draw all weights, in float64 and in the order of their names, so that dtypes share them.

    Parameters
    ----------
    model
        Changed in place.
    num_bytes
        Vocabulary entries from this one on are special tokens: their rows of the output projection
        are zero, so that greedy decoding, whose best logit is far above 0, never chooses them.
    seed
        Seed of all weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        module = name.split(".")[-2]
        is_decoder = "language_model" in name
        if name == "lm_head.weight":
            noise *= LOGIT_STD / parameter.shape[1] ** 0.5
            noise[num_bytes:] = 0
        elif name.endswith("bias"):
            # On keys: channels with an offset, which a code without a zero point cannot hold.
            noise *= 0.5
        elif is_decoder and module in ("q_norm", "k_norm"):
            # Normed q and k have unit channels: their product over sqrt(D) has unit deviation.
            noise = SCORE_STD**0.5 * (1 + 0.2 * noise)
        elif is_decoder and module in ("q_proj", "k_proj"):
            noise *= (SCORE_STD / parameter.shape[1]) ** 0.5
        elif is_decoder and module == "o_proj":
            noise *= CONTEXT_GAIN / parameter.shape[1] ** 0.5
        elif parameter.ndim == 1:  # norms, layer scales and class tokens
            noise = 1 + 0.1 * noise
        elif module != "embed_tokens" and "pos" not in name:  # embeddings keep unit deviation
            noise /= parameter[0].numel() ** 0.5
        parameter.copy_(noise)


def make_checkpoint(
    style: str,
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> Path:
    """Write a checkpoint directory with weights, processor, tokenizer and chat template.

    Parameters
    ----------
    style
        One of :data:`STYLES`.
    directory
        Created if missing; files in it are overwritten.
    dtype
        Of the saved weights.
    seed
        Seed of the weights; by default one that is known to give clear greedy choices.

    Returns
    -------
    Path
        ``directory``.
    """
    directory = Path(directory)
    tokenizer = byte_tokenizer(SPECIAL_TOKENS[style], model_max_length=MAX_LENGTH)
    model, processor = _BUILDERS[style](tokenizer)
    _randomise(model, 256, SEEDS[style] if seed is None else seed)
    model.generation_config = GenerationConfig(**_ids(tokenizer), do_sample=False)
    model.to(dtype).save_pretrained(directory)
    if style == "llava":
        # transformers 5 drops a level of CLIP's names; published checkpoints and vLLM have it.
        path = directory / "model.safetensors"
        weights = {
            re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): weight
            for name, weight in load_file(path).items()
        }
        save_file(weights, path, {"format": "pt"})
    processor.save_pretrained(directory)
    return directory


def make_image(width: int, height: int, seed: int) -> Image.Image:
    """Return an RGB image of random 7 x 7 squares, so that neighbouring patches differ."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randint(
        0, 256, (-(-height // 7), -(-width // 7), 3), generator=generator, dtype=torch.uint8
    )
    image = Image.fromarray(squares.numpy())
    return image.resize((image.width * 7, image.height * 7), Image.NEAREST).crop(
        (0, 0, width, height)
    )


if __name__ == "__main__":
    make_checkpoint(sys.argv[1], sys.argv[2], getattr(torch, (sys.argv[3:] or ["float32"])[0]))
