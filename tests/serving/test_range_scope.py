"""Ranges of a page or of a request: what do_kv_cache_update writes, and what a real vLLM does."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from tests.serving.engine import BLOCK, IMAGE_TOKENS, Engine
from vllm_calibquant.attention.cpu import MixedCPUImpl, Step, as_bytes
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.config import CalibQuantConfig
from vllm_calibquant.format import PageFormat

D, HEADS = 32, 2

# What is written.


def page_slots(page: int, count: int) -> torch.Tensor:
    """Slots of the first ``count`` sub-slots of a visual page, in order."""
    ids = page + ((1 + torch.arange(count)) << 23)
    return (ids[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def text_slots(page: int, count: int) -> torch.Tensor:
    return page * BLOCK + torch.arange(count)


def published(x: torch.Tensor, factor: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of a channel's numbers: ``c [min, max]`` in ``2**bits - 1`` steps."""
    low, high = factor * min(x.tolist()), factor * max(x.tolist())
    return torch.tensor((high - low) / (2**bits - 1)), torch.tensor(low)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("scope", ["page", "request"])
def test_ranges_and_codes(monkeypatch, scope: str, bits: int) -> None:
    """Of three requests of a step, two have visual tokens, among text and in pages of any order."""
    config = CalibQuantConfig(bits=bits, preset="calibquant-paper", range_scope=scope)
    impl = object.__new__(MixedCPUImpl)
    impl.codec = Codec.of(config, HEADS, D, torch.float32)
    fmt = impl.codec.page_format
    filled = [{}, {5: fmt.slots, 2: 3, 7: fmt.slots}, {3: 2, 1: 4}]  # by request; page: sub-slots
    parts = [
        text_slots(9, 1),
        *(text_slots(10, 5), *(page_slots(*at) for at in filled[1].items()), text_slots(11, 3)),
        *(*(page_slots(*at) for at in filled[2].items()), text_slots(12, 2)),
        torch.tensor([-1, -1]),  # padding
    ]
    slots = torch.cat(parts)
    lengths = [sum(map(len, some)) for some in (parts[:1], parts[1:6], parts[6:9])]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    impl.step = Step([slice(*ends) for ends in pairwise(starts)])
    generator = torch.Generator().manual_seed(bits)
    key, value = torch.randn(2, len(slots), HEADS, D, generator=generator)
    key[starts[2] :] += 2  # the last request's
    stored = []
    monkeypatch.setattr(
        CPUAttentionBackendImpl, "do_kv_cache_update", lambda *args: stored.extend(args[-1])
    )
    pool = torch.zeros(13, HEADS, BLOCK, 2 * D)
    impl.do_kv_cache_update(None, key, value, pool, slots)

    text = [text_slots(9, 1), text_slots(10, 5), text_slots(11, 3), text_slots(12, 2)]
    assert stored == torch.cat(text).tolist()
    coded = slots >= 2**23 * BLOCK
    for request, pages in enumerate(filled):
        own = torch.zeros_like(coded)
        own[starts[request] : starts[request + 1]] = True
        own &= coded
        for page, count in pages.items():
            mine = coded & (slots // BLOCK % 2**23 == page)
            share = own if scope == "request" else mine
            k_codes, v_codes, ranges = fmt.unpack(as_bytes(pool)[page])
            assert mine.sum() == count * BLOCK
            for codes, x, factor, (scale, offset) in (
                (k_codes, key, config.key_factor, ranges[:, :2].unbind(1)),
                (v_codes, value, config.value_factor, ranges[:, 2:].unbind(1)),
            ):
                for head in range(HEADS):
                    for channel in range(D):
                        s, low = published(x[share, head, channel], factor, bits)
                        torch.testing.assert_close(scale[head, channel], s)
                        torch.testing.assert_close(offset[head, channel], low)
                    steps = (x[mine, head] - offset[head]) / scale[head]
                    expected = steps.clamp(0, 2**bits - 1).round()
                    assert torch.equal(codes[head, : count * BLOCK].float(), expected)


# A real vLLM.


def range_groups(engine: Engine) -> list[int]:
    """How many pages have the same ranges in all layers and heads, for every group of such."""
    pages = engine.visual_page_ids()
    cached = torch.stack([as_bytes(cache[pages]) for cache in engine.caches], 1)
    ranges = PageFormat.uniform(64, 1, torch.float32).unpack_ranges(cached)
    in_layers = [part.flatten(1).unique(dim=0, return_counts=True)[1] for part in ranges.unbind(1)]
    assert all(len(counts) == len(in_layers[0]) for counts in in_layers)
    return sorted(in_layers[0].tolist())


@pytest.mark.parametrize("scope", ["page", "request"])
def test_pages_of_requests(model, questions, scope: str) -> None:
    """Two requests of one step, and one that finds its first image in the prefix cache.

    An image's 35 or 36 blocks fill three pages.
    """
    a, b, c = (questions[i].image for i in (0, 2, 4))
    with Engine(
        model,
        "calibquant1",
        {"range_scope": scope},
        max_num_batched_tokens=4 * IMAGE_TOKENS,
        limit_mm_per_prompt={"image": 2},
    ) as engine:
        prompts = [engine.prompt("Read line 1.", image) for image in (a, b)]
        with engine.steps() as steps:
            cold = engine.ask(*prompts)
        assert len(steps[0]) == 2 and min(steps[0].values()) > IMAGE_TOKENS
        assert [answer.hit for answer in cold] == [0, 0]
        assert range_groups(engine) == {"page": [1] * 6, "request": [3, 3]}[scope]
        (hit,) = engine.ask(engine.prompt("Read line 1.", a, c))
        assert hit.hit == IMAGE_TOKENS
        assert range_groups(engine) == {"page": [1] * 9, "request": [3, 3, 3]}[scope]


def test_pages_of_chunks(model, questions) -> None:
    """A later chunk has ranges of its own: what was coded stays as it is."""
    with Engine(
        model, "calibquant1", {"range_scope": "request"}, max_num_batched_tokens=IMAGE_TOKENS
    ) as engine:
        prompt = engine.prompt(questions[0].question, questions[0].image)
        with engine.steps() as steps:
            (chunked,) = engine.ask(prompt)
        assert [sum(step.values()) for step in steps][:2] == [
            29 * BLOCK,
            len(chunked.prompt) - 29 * BLOCK,
        ]
        assert range_groups(engine) == [1, 2]
        first, second = engine.ask(prompt)[0], engine.ask(prompt)[0]
        assert first.hit == IMAGE_TOKENS
        assert first.said == second.said
