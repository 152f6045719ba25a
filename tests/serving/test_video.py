"""A video's tokens are visual tokens: in codes, unless the settings leave them out."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference.checkpoints import make_checkpoint
from tests.serving.engine import Engine, distance

PROMPT = "Look: <|vision_start|><|video_pad|><|vision_end|> what happens here?"


def frames(seed: int) -> np.ndarray:
    """Eight frames of noise, two of which make a temporal patch: uint8 ``[8, 224, 224, 3]``."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 28, 28, 3), dtype=np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))


def watch(engine: Engine) -> list[int]:
    """Collect how many visual tokens the pool holds after each scheduling."""
    held: list[int] = []
    scheduler = engine.scheduler
    schedule = scheduler.schedule

    def recording(*args):
        output = schedule(*args)
        if hasattr(scheduler, "page_counts"):
            held.append(scheduler.page_counts().visual_tokens)
        return output

    scheduler.schedule = recording
    return held


def run(checkpoint, dtype: str, calibquant=None):
    timing = {"fps": 2.0, "duration": 4.0, "total_num_frames": 8, "frames_indices": list(range(8))}
    prompts = [
        {"prompt": PROMPT, "multi_modal_data": {"video": [(frames(i), timing)]}} for i in range(2)
    ]
    with Engine(checkpoint, dtype, calibquant, max_num_batched_tokens=2048) as engine:
        held = watch(engine)
        return engine.ask(*prompts, max_tokens=16, ignore_eos=True), held


def test_videos_are_stored_in_codes(checkpoint):
    stock, _ = run(checkpoint, "auto")
    wide, held = run(checkpoint, "calibquant4")
    # 4 temporal patches of 8 x 8 tokens each: 16 blocks, of which the ends are partly text.
    assert 2 * 14 * 16 <= max(held) <= 2 * 16 * 16
    assert max(distance(a, b) for a, b in zip(wide, stock, strict=True)) < 0.5
    narrow, _ = run(checkpoint, "calibquant1")
    assert max(distance(a, b) for a, b in zip(narrow, stock, strict=True)) > 0.01

    images_only, held = run(checkpoint, "calibquant4", {"modalities": ["image"]})
    assert max(held) == 0
    assert [a.said for a in images_only] == [a.said for a in stock]
