"""``vllm-calibquant inspect``: what codes do to one image and one question, as a page to look at.

A real vLLM in this process answers the question at 16 bits and under each setting, cold and behind
a prefix hit.  Of the cold prompt, which is computed in one step, every attention layer is watched:
its keys and values before and after coding, and its output as it is and as codes would make it.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vllm_calibquant import compat
from vllm_calibquant.calibrate.probe import Places, WatchedLayer
from vllm_calibquant.config import PROFILE_DTYPE, SECTION, ConfigError
from vllm_calibquant.inspector_page import render
from vllm_calibquant.output import check_output
from vllm_calibquant.profile import ModelIdentity, load_profile, model_differences

EXACT = "auto"
OTHER_QUESTION = "What is this?"
"""Asked before the question where that is to find the image in the prefix cache."""


@dataclass(frozen=True)
class Setting:
    """A KV cache dtype with our settings."""

    name: str
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Damage:
    """What codes did in one layer.

    Errors are lengths of differences over lengths: of keys and values over their deviation from
    their mean over the image, so that 1 is the error of knowing nothing but that mean.
    """

    key: list[float]
    """Of each KV head."""
    value: list[float]
    output: list[float]
    """Of each query head: attention output of the tokens behind the image if they read codes."""
    tokens: torch.Tensor
    """float32 ``[tokens]``: error of each token's keys, all heads together; NaN where exact."""
    pages: torch.Tensor
    """int64 ``[tokens]``: visual page of each token, counted from 0, or -1."""
    attention: torch.Tensor
    """float32 ``[tokens]``: exact attention of the last token of the prompt, mean over heads."""


@dataclass
class Seen:
    """What was seen of one setting."""

    setting: Setting
    cold: str
    """The answer."""
    hit: str | None = None
    """The answer where the question found the image in the prefix cache."""
    page_tokens: int | None = None
    """Visual tokens of a full page."""
    layers: dict[int, Damage] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows."""

    model: str
    question: str
    image: Image.Image
    positions: list[int]
    """Of the image's tokens in the prompt."""
    seen: list[Seen]
    tile_tokens: int | None = None
    """Tokens of a tile, in models that may cut an image into tiles; None in those of
    :data:`WHOLE_IMAGES`."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens; (1, tokens) if they are no plain grid."""
        tokens = len(self.positions)
        if self.tile_tokens is not None and tokens != self.tile_tokens:
            return 1, tokens
        return token_grid(tokens, self.image.width / self.image.height)


WHOLE_IMAGES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Types of models that lay the tokens of a whole image out row by row.  Others cut it into tiles
and add a thumbnail, or have separators."""


def token_grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Rows and columns, row by row, whose ratio is nearest to an image's width over height.

    (1, tokens) if no pair of factors comes near.
    """
    pairs = [(r, tokens // r) for r in range(1, tokens + 1) if tokens % r == 0]
    if int(sqrt(tokens)) ** 2 == tokens:  # a vision tower with square input, whatever it was given
        return (int(sqrt(tokens)),) * 2
    rows, columns = min(pairs, key=lambda p: abs(p[1] / p[0] / aspect - 1))
    return (rows, columns) if abs(columns / rows / aspect - 1) < 0.35 else (1, tokens)


class Recorder(WatchedLayer):
    """Watches one layer and compares its codes with what they stand for."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.recording = True
        self.damage: Damage | None = None

    def watch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Compare in the first step with visual pages."""
        if not self.recording:
            return
        at = Places.of(self.slot_mapping, self.impl.codec.page_format.tokens)
        if at.behind:
            self.recording = False
            n = at.tokens
            exact = output.view(-1, query.shape[1], value.shape[2])[:n]
            self.damage = self._compare(query[:n], key[:n], value[:n], kv_cache, exact, at)

    def _compare(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        exact: torch.Tensor,
        at: Places,
    ) -> Damage:
        codec, visual, coded = self.impl.codec, at.read(kv_cache), at.visual

        key_codes, value_codes, ranges = codec.page_format.unpack(visual.pages)
        k_scale, k_offset, v_scale, v_offset = ranges.float().unbind(-2)  # [P, Hkv, D] each
        errors, tokens = {}, torch.full((at.tokens,), float("nan"))
        for name, x, codes, scale, offset in (
            ("key", key, key_codes, k_scale, k_offset),
            ("value", value, value_codes, v_scale, v_offset),
        ):
            x = x[coded].float()
            read = offset[at.page] + scale[at.page] * codes[at.page, :, at.offset].float()
            if codec.basis is not None:
                part = getattr(codec.basis, name)
                read = torch.einsum("nhd,hde->nhe", read, part.inverse) + part.mean
            lost, whole = (read - x).square(), (x - x.mean(0)).square()
            errors[name] = ratio(lost.sum((0, 2)), whole.sum((0, 2))).tolist()
            if name == "key":
                mean = whole.sum((1, 2)).mean()
                tokens[coded.cpu()] = ratio(lost.sum((1, 2)), mean).cpu()

        attended = self.read_codes(query[at.behind :], key[at.text], value[at.text], visual)
        exact = exact[at.behind :].float()
        lost, whole = (attended - exact).square().sum((0, 2)), exact.square().sum((0, 2))

        group = query.shape[1] // key.shape[1]
        last = query[-1].float().unflatten(0, (-1, group))  # [Hkv, G, D]
        scores = torch.einsum("hgd,nhd->hgn", last, key.float()) * self.impl.scale
        number = torch.full((at.tokens,), -1)
        number[coded.cpu()] = at.page.cpu()
        return Damage(
            errors["key"],
            errors["value"],
            ratio(lost, whole).tolist(),
            tokens,
            number,
            scores.softmax(-1).mean((0, 1)).cpu(),
        )


def ratio(lost: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Relative error of squared lengths."""
    return (lost / whole.clamp(min=1e-30)).sqrt()


@contextmanager
def engine(model: str, setting: Setting, llm: dict[str, Any]) -> Iterator[Any]:
    """An ``LLM`` in this process; prompts are computed in one step each."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its objects are to be reached
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"additional_config": {SECTION: setting.options}} if setting.options else {}
    length = llm.get("max_model_len")
    running = LLM(
        model,
        kv_cache_dtype=setting.dtype,
        enforce_eager=True,
        enable_chunked_prefill=False,
        **({"max_num_batched_tokens": max(8192, length)} if length else {}),
        **options,
        **llm,
    )
    try:
        yield running
    finally:
        running.llm_engine.engine_core.shutdown()
        del running
        cleanup_dist_env_and_memory()
        gc.collect()


def look(
    model: str, setting: Setting, image: Image.Image, question: str, max_tokens: int, llm: Any
) -> tuple[Seen, list[int]]:
    """Answers and damage under one setting, and the positions of the image's tokens.

    Raises
    ------
    ConfigError
        If the image fills no visual page.
    """
    from vllm import SamplingParams

    def chat(text: str, tokens: int) -> str:
        content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": text}]
        params = SamplingParams(temperature=0, max_tokens=tokens)
        messages: Any = [{"role": "user", "content": content}]
        (output,) = running.chat(messages, params, use_tqdm=False)
        return output.outputs[0].text

    recorders: dict[int, Recorder] = {}

    def watch(module: torch.nn.Module) -> None:
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models.utils import extract_layer_index

        from vllm_calibquant.attention.common import MixedLayer

        for layer in module.modules():
            if isinstance(layer, Attention) and isinstance(layer.impl, MixedLayer):
                recorders[extract_layer_index(layer.layer_name)] = Recorder(layer)

    with engine(model, setting, llm) as running:
        positions: list[int] = []
        scheduler = compat.scheduler_of(running)
        schedule = scheduler.schedule

        def note(*args: Any, **kwargs: Any) -> Any:
            for request in scheduler.requests.values():
                positions[:] = [
                    t
                    for feature in request.mm_features
                    for start, last in feature.mm_position.extract_embeds_range()
                    for t in range(start, last + 1)
                ]
            return schedule(*args, **kwargs)

        scheduler.schedule = note
        found = Seen(setting, "")
        if setting.dtype == EXACT:
            found.cold = chat(question, max_tokens)
            return found, positions
        running.apply_model(watch)
        found.cold = chat(question, max_tokens)
        for index, recorder in sorted(recorders.items()):
            if recorder.damage is not None:
                found.layers[index] = recorder.damage
                found.page_tokens = recorder.impl.codec.page_format.tokens
            recorder.recording = False
        if not found.layers:
            raise ConfigError(
                "the image fills no visual page, which takes 32 visual tokens in a row; give a "
                "larger one"
            )
        if not running.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        chat(OTHER_QUESTION, 1)
        found.hit = chat(question, max_tokens)
    return found, positions


def inspect_image(
    model: str,
    image: Path,
    question: str,
    out: Path,
    *,
    widths: Sequence[int] = (4, 2, 1),
    profile: Path | None = None,
    max_tokens: int = 64,
    llm: dict[str, Any] | None = None,
) -> str:
    """Write the page.

    Parameters
    ----------
    model
        Name or directory, as for ``vllm serve``.
    image, question
        What is asked.
    out
        The HTML file, which needs nothing besides itself.
    widths
        Bits to look at.
    profile
        A profile to look at too.
    max_tokens
        Of an answer.
    llm
        Further arguments of vLLM's ``LLM``.

    Returns
    -------
    str
        A table of answers and mean errors.

    Raises
    ------
    ConfigError
        If a file cannot be read or the image is too small.
    """
    from vllm.engine.arg_utils import EngineArgs

    check_output(out)
    try:
        picture = Image.open(image).convert("RGB")
    except OSError as error:
        raise ConfigError(f"{image} is no image that can be read: {error}") from None
    config = EngineArgs(model, **(llm or {})).create_model_config()
    if profile is not None:
        loaded, identity = load_profile(str(profile)), ModelIdentity.of(config)
        for reason in model_differences(loaded, str(profile), identity):
            raise ConfigError(reason)
    settings = [
        Setting("16 bits", EXACT),
        *(Setting(f"{b} bit{'s' * (b > 1)}", f"calibquant{b}") for b in widths),
    ]
    if profile is not None:
        settings.append(Setting(profile.stem, PROFILE_DTYPE, {"profile": str(profile)}))
    seen: list[Seen] = []
    positions: list[int] = []
    for setting in settings:
        one, positions = look(model, setting, picture, question, max_tokens, llm or {})
        seen.append(one)
    tile_tokens = None
    if config.hf_config.model_type not in WHOLE_IMAGES:
        tile_tokens = getattr(config.hf_config, "image_seq_length", 0)
    found = Inspection(model, question, picture, positions, seen, tile_tokens)
    out.write_text(render(as_json(found), picture), encoding="utf-8")
    return summary(found)


def as_json(found: Inspection) -> dict[str, Any]:
    """What the page shows, as numbers and strings; token arrays follow the image's tokens."""
    at = torch.tensor(found.positions)

    def of_tokens(values: torch.Tensor) -> list[float | None]:
        return [None if x != x else round(x, 4) for x in values[at].tolist()]

    settings = []
    for one in found.seen:
        layers = one.layers
        entry: dict[str, Any] = {
            "name": one.setting.name,
            "dtype": one.setting.dtype,
            "options": one.setting.options,
            "cold": one.cold,
            "hit": one.hit,
            "page_tokens": one.page_tokens,
            "layers": sorted(layers),
        }
        if layers:
            parts = list(layers.values())
            entry |= {
                name: [[round(x, 4) for x in getattr(layer, name)] for layer in parts]
                for name in ("key", "value", "output")
            }
            entry["token_error"] = of_tokens(torch.stack([p.tokens for p in parts]).mean(0))
            entry["pages"] = parts[0].pages[at].tolist()
            attention = torch.stack([p.attention for p in parts]).mean(0)
            entry["attention"] = [float(f"{x:.3g}") for x in attention[at].tolist()]
        settings.append(entry)
    rows, columns = found.grid
    return {
        "model": found.model,
        "question": found.question,
        "grid": [rows, columns],
        "tokens": len(found.positions),
        "settings": settings,
    }


def mean(values: list[list[float]]) -> float:
    """Mean over layers and heads."""
    return float(torch.tensor(values).mean())


def summary(found: Inspection) -> str:
    """A line for each setting."""
    data = as_json(found)
    lines = [f"{'':<12} {'K':>6} {'V':>6} {'output':>7}  answer (behind a prefix hit)"]
    for one in data["settings"]:
        errors = (
            f"{mean(one['key']):6.3f} {mean(one['value']):6.3f} {mean(one['output']):7.3f}"
            if one["layers"]
            else " " * 21
        )
        hit = "" if one["hit"] is None else f" ({json.dumps(one['hit'], ensure_ascii=False)})"
        answer = json.dumps(one["cold"], ensure_ascii=False)
        lines.append(f"{one['name']:<12} {errors}  {answer}{hit}")
    return "\n".join(lines)
