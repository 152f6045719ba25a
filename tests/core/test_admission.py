"""What a prompt takes alone, against what vLLM's manager takes for it."""

from __future__ import annotations

import pytest

from tests.core.harness import BLOCK, Media, Text, cache_manager, make_request, mixed_spec
from vllm_calibquant.core.layout import clip_chunk, prompt_pages

PROMPTS = {
    "text": [Text.of(1000, 1)],
    "image": [Text.of(10, 1), Media(3328, 2, "wrapped"), Text.of(5, 3)],
    "image at once": [Media(576, 2), Text.of(40, 3)],
    "rows": [Text.of(3, 1), Media(1200, 2, "rows"), Text.of(100, 3)],
    "frames": [p for i in range(20) for p in (Text.of(8, i), Media(256, i, modality="video"))],
    "sound": [Text.of(3, 1), Media(500, 2, modality="audio"), Media(500, 3)],
}


@pytest.mark.parametrize("chunk", [64, 100, 512, 2048, 100000])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("name", PROMPTS)
def test_pages_are_those_of_the_manager(name, bits, chunk):
    spec = mixed_spec(bits)
    kv = cache_manager(spec, 2000)
    (manager,) = kv.coordinator.single_type_managers
    request = make_request("r", PROMPTS[name])
    manager.requests = {"r": request}
    shape = {"block_size": BLOCK, "slots": spec.slots}
    while (start := request.num_computed_tokens) < request.num_tokens:
        step = min(chunk, request.num_tokens - start)
        step = clip_chunk(manager.spans("r"), start, step, **shape)
        assert kv.allocate_slots(request, step) is not None
        request.num_computed_tokens = start + step
        taken = 1999 - kv.block_pool.get_num_free_blocks()
    assert prompt_pages(manager.spans("r"), request.num_tokens, chunk, **shape) == taken
