"""Requests longer than the pool would hold at 16 bits, and requests longer than it holds at all."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.checkpoints import make_checkpoint
from tests.serving.engine import Engine
from vllm_calibquant import admission

VIDEO = "Look: <|vision_start|><|video_pad|><|vision_end|> what happens here?"
TOKENS = 1536
"""Visual tokens of the video: 24 temporal patches of 8 x 8."""
PAGES = 48
"""With vLLM's null page: room for 752 tokens at 16 bits."""
SETTINGS = {
    "max_model_len": 4096,
    "num_gpu_blocks_override": PAGES,
    "max_num_batched_tokens": 512,
    "skip_mm_profiling": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def answer_of_a_large_pool(checkpoint):
    settings = {**SETTINGS, "num_gpu_blocks_override": 400}
    with Engine(checkpoint, "calibquant1", **settings) as engine:
        return engine.ask(video(1), max_tokens=8, ignore_eos=True)[0]


@pytest.fixture(scope="module")
def engine(checkpoint, answer_of_a_large_pool):
    with Engine(checkpoint, "calibquant1", **SETTINGS) as running:
        yield running


def video(seed: int) -> dict:
    noise = np.random.default_rng(seed).integers(0, 256, (48, 28, 28, 3), dtype=np.uint8)
    frames = noise.repeat(8, axis=1).repeat(8, axis=2)
    timing = {
        "fps": 2.0,
        "duration": 24.0,
        "total_num_frames": 48,
        "frames_indices": list(range(48)),
    }
    return {"prompt": VIDEO, "multi_modal_data": {"video": [(frames, timing)]}}


def text(tokens: int, seed: int = 0) -> dict:
    return {"prompt_token_ids": [65 + (seed + i * i) % 26 for i in range(tokens)]}


def test_stock_refuses_to_start(checkpoint):
    with pytest.raises(ValueError, match="is needed, which is larger than the available KV cache"):
        Engine(checkpoint, "auto", **{**SETTINGS, "block_size": 16, "num_gpu_blocks_override": 2})


def test_a_video_longer_than_the_pool_at_16_bits(engine, answer_of_a_large_pool):
    (answer,) = engine.ask(video(1), max_tokens=8, ignore_eos=True)
    assert len(answer.prompt) > TOKENS > 2 * 16 * (PAGES - 1)
    assert answer.said == answer_of_a_large_pool.said
    assert engine.pages_in_use == 0


def test_a_text_that_cannot_fit_is_refused(engine):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"takes 63 pages .* which has 47"):
        engine.ask(text(1000))
    assert engine.ask(text(100), max_tokens=2)
    assert engine.pages_in_use == 0


def test_what_only_the_engine_knows_ends_with_an_error(engine, monkeypatch):
    """As with data parallelism, where the API server knows the pages of all engines together."""
    processor = engine.llm.llm_engine.input_processor
    monkeypatch.setitem(admission._limits, processor, None)
    from vllm import SamplingParams

    prompts = [text(50), text(1000), text(60)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert engine.pages_in_use == 0


def test_an_answer_ends_where_the_pool_ends(engine):
    (answer,) = engine.ask(text(700), max_tokens=3000, ignore_eos=True)
    # The last token is never stored.
    assert len(answer.prompt) + len(answer.tokens) == 16 * (PAGES - 1) + 1
    assert engine.pages_in_use == 0


def test_nothing_waits_for_ever(engine):
    """Long requests beside others get cut into small chunks, whose pages are partly empty."""
    engine.forget()
    prompts = [text(300, 1), video(2), text(200, 2), video(3), text(500, 3), video(2), text(20, 4)]
    answers = engine.ask(*prompts, max_tokens=40, ignore_eos=True)
    assert [len(a.tokens) for a in answers] == [40] * len(prompts)
    assert engine.pages_in_use == 0


def test_partly_filled_pages_of_the_prefix_cache_are_left(engine):
    """Small chunks fill the pool before the video ends: it is computed again from the start."""
    engine.forget()
    scheduler = engine.scheduler
    most = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = 33
    preempted = scheduler._preempt_request

    def undisturbed(*args, **kwargs):
        scheduler.max_num_scheduled_tokens = most
        return preempted(*args, **kwargs)

    scheduler._preempt_request = undisturbed
    try:
        (answer,) = engine.ask(video(4), max_tokens=4, ignore_eos=True)
    finally:
        scheduler._preempt_request = preempted
    assert scheduler.max_num_scheduled_tokens == most, "the pool never became full"
    assert len(answer.tokens) == 4
    assert engine.pages_in_use == 0
