"""Checkpoint directories of real shape without weights, for ``--load-format dummy``, and profiles.

Speed depends on shapes and not on the values of weights, so a benchmark needs no download: a
directory has the configuration of the published model, a byte tokenizer and the model's own image
processor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
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

from benchmarks.shapes import INTERNVL_TEXT, INTERNVL_VISION, NAMES
from vllm_calibquant.threads import one_thread

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TILE = 448

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


@one_thread()
def make_profile(directory: Path, bits: float, path: Path) -> None:
    """Write a profile for a directory of :func:`make_model`, of random moments.

    Bases and bits are what ``calibrate`` finds in closed form for them.  How steeply the worth of
    components falls differs from layer to layer, so that planes are split among K and V in several
    ways, as in real profiles.

    Parameters
    ----------
    directory
        Of the model.
    bits
        On average.
    path
        The profile.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_calibquant.calibrate.moments import Moments
    from vllm_calibquant.calibrate.search import Budget, Choice, Designer
    from vllm_calibquant.profile import ModelIdentity

    model = ModelIdentity.of(EngineArgs(str(directory)).create_model_config())
    heads, d = model.num_kv_heads, model.head_size
    generator = torch.Generator().manual_seed(0)

    def matrices(fall: float) -> torch.Tensor:
        """Of each head, with eigenvalues from 1 down to about exp(-fall)."""
        random = torch.randn(heads, d, d, dtype=torch.float64, generator=generator)
        vectors = torch.linalg.qr(random)[0]
        return vectors * (torch.arange(d) * -fall / d).exp() @ vectors.mT

    moments = {}
    for layer in range(model.num_layers):
        found = Moments.zeros(heads, d, torch.device("cpu"))
        found.query, found.output = matrices(0.0), matrices(0.0)
        found.key, found.value = matrices(5.0), matrices(4.0) * (0.2, 0.4, 0.8)[layer % 3]
        found.weights += 1
        moments[layer] = found
    Designer(model, Budget.of(d, bits), moments).profile(Choice()).save(path)


def cache_settings(name: str, directory: Path) -> dict[str, Any]:
    """Engine arguments of a KV cache dtype and what may follow it.

    Parameters
    ----------
    name
        A KV cache dtype, alone or before ``+hadamard`` or, for a profile of 1.25 bits,
        ``+profile1.25``.
    directory
        Of the model, where a profile is made if it has none yet.
    """
    dtype, _, option = name.partition("+")
    section = {}
    if option == "hadamard":
        section = {"transform": option}
    elif option:
        path = directory / f"{option}.safetensors"
        if not path.exists():
            make_profile(directory, float(option.removeprefix("profile")), path)
        section = {"profile": str(path)}
    extra = {"additional_config": {"calibquant": section}} if section else {}
    return {"kv_cache_dtype": dtype, **extra}


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
