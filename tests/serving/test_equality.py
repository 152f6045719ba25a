"""Equal answers however a request is computed, and the hit counters that show how it was.

Prefill is exact and decoding reads codes, so a prompt computed in one chunk and one that found its
image in the prefix cache differ by what the codes lose: little at 4 bits, much at 1.  Where both
read the same codes their answers are equal; each test says which of the two it compares.  Codes
themselves are equal only as far as K and V are: a matrix product over other rows rounds otherwise
in the last bit, and a number that lies between two codes then falls to the other side.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.engine import BLOCK, END, IMAGE_TOKENS, Answer, Engine, distance
from vllm_calibquant.format import PageFormat

NOISE = 1e-3
"""Bound on differences of log-probabilities that only come from the order of float32 sums."""

TEXTS = (
    "What is the serial?",
    "How many red circles?",
    "Read line 3. " * 40,
    "Where is the blue square? What is in row 2 column 3? " * 12,
)
"""The longer ones fill more than one page of stock vLLM's 128 tokens."""

BITS = pytest.mark.parametrize("bits", [1, 2, 4])


def full_blocks(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


@pytest.fixture(scope="module")
def stock(model, readings) -> dict[str, list]:
    """Answers of stock vLLM with 16-bit pages, which here are 32-bit ones."""
    with Engine(model) as engine:
        return {
            "text": engine.ask(*map(engine.prompt, TEXTS), max_tokens=40, ignore_eos=True),
            "image": [engine.ask(engine.prompt(q.question, q.image))[0] for q in readings],
            "score": [engine.score(engine.prompt(q.question, q.image), q.answer) for q in readings],
        }


# Text.


@BITS
def test_text_equals_stock(model, stock, questions, bits: int) -> None:
    """Bit for bit in float32.

    Not so in bfloat16 on hosts with AMX: there stock's 128-token pages take other kernels.
    """
    with Engine(model, f"calibquant{bits}") as engine:
        engine.ask(engine.prompt(questions[0].question, questions[0].image))
        answers = engine.ask(*map(engine.prompt, TEXTS), max_tokens=40, ignore_eos=True)
    assert [a.said for a in answers] == [a.said for a in stock["text"]]
    assert all(len(a.tokens) == 40 for a in answers)


def test_images_left_out_equal_stock(model, stock, readings) -> None:
    with Engine(model, "calibquant1", {"modalities": ["video"]}) as engine:
        answers = [engine.ask(engine.prompt(q.question, q.image))[0] for q in readings]
    # Some hosts sum long prompts in another order in stock's 128-token pages.
    assert [a.tokens for a in answers] == [a.tokens for a in stock["image"]]
    pairs = zip(answers, stock["image"], strict=True)
    assert max(distance(ours, theirs) for ours, theirs in pairs) < NOISE


# The same codes.


@BITS
def test_chunked_equals_warm(model, readings, bits: int) -> None:
    """A chunk that ends with the image's last whole page, and a hit of the pages that it made."""
    with Engine(model, f"calibquant{bits}", max_num_batched_tokens=IMAGE_TOKENS) as engine:
        for question in readings:
            prompt = engine.prompt(question.question, question.image)
            with engine.steps() as steps:
                (chunked,) = engine.ask(prompt)
            # The image's 35 blocks are two pages of 14, five of 7 or eleven of 3, and a rest, which
            # is left to the next chunk.
            end = {1: 1 + 28, 2: 1 + 35, 4: 1 + 33}[bits] * BLOCK
            assert [sum(step.values()) for step in steps][:2] == [end, len(chunked.prompt) - end]
            first, second = engine.ask(prompt)[0], engine.ask(prompt)[0]
            assert (chunked.hit, first.hit, second.hit) == (0, IMAGE_TOKENS, IMAGE_TOKENS)
            assert second.said == first.said
            if end == IMAGE_TOKENS:  # else the question came with the rest, which it read exactly
                assert first.tokens == chunked.tokens
                assert distance(first, chunked) < NOISE


@pytest.mark.parametrize("bits", [1, 4])
def test_hits_of_a_chat(model, questions, bits: int) -> None:
    """Everything that can hit does: whole blocks that were computed, and not the prompt's last."""
    image, other = questions[0].image, questions[2].image
    with Engine(model, f"calibquant{bits}") as engine:
        queries = hits = 0

        def ask(prompt: dict, expected: int) -> Answer:
            nonlocal queries, hits
            (answer,) = engine.ask(prompt, ignore_eos=True)
            queries, hits = queries + len(answer.prompt), hits + expected
            assert answer.hit == expected
            assert engine.metric("vllm:prefix_cache_queries") == queries
            assert engine.metric("vllm:prefix_cache_hits") == hits
            assert engine.pages_in_use == 0
            return answer

        turns = ["What is the serial number of the red circle in row 3?"]
        first = ask(engine.chat(turns, image), 0)
        ask(engine.chat(turns, image), full_blocks(len(first.prompt) - 1))
        ask(engine.chat(["How many red circles?"], image), IMAGE_TOKENS)
        ask(engine.chat(turns, other), 0)  # an image's content is in the hash of its blocks

        last = first
        for question in ("Where is the blue square?", "Read line 3.", "What is the total?"):
            turns += [[*last.tokens, END], question]
            # The last generated token was never computed: nothing came after it.
            computed = len(last.prompt) + len(last.tokens) - 1
            last = ask(engine.chat(turns, image), full_blocks(computed))


def test_hit_in_the_middle_of_a_page(model, questions) -> None:
    """Two images, the second another one: its page begins with the last blocks of the first."""
    a, b, c = (questions[i].image for i in (0, 2, 4))
    with Engine(model, "calibquant4", limit_mm_per_prompt={"image": 2}) as engine:
        ask = lambda *images: engine.ask(engine.prompt("Read line 1.", *images))[0]  # noqa: E731
        assert ask(a, b).hit == 0
        assert ask(a, c).hit == IMAGE_TOKENS
        assert ask(a, b).hit == 2 * IMAGE_TOKENS
        both = ask(a, c)
        assert both.hit == 2 * IMAGE_TOKENS
        engine.forget()
        assert distance(ask(a, c), both) < NOISE
        assert engine.pages_in_use == 0


def test_long_cold_prompt_beside_warm_ones(model, questions) -> None:
    """One step with a full prefill and prefix hits takes no shortcut for either (vLLM #46460)."""
    cold, *warm = (questions[i] for i in (2, 0, 4, 6))
    with Engine(model, "calibquant1", max_num_batched_tokens=4 * IMAGE_TOKENS) as engine:
        prompts = [engine.prompt(q.question, q.image) for q in warm]
        for prompt in prompts:
            engine.ask(prompt)
        alone = [engine.ask(prompt)[0] for prompt in prompts]
        long = engine.chat(["Read line 2. " * 30, cold.question], cold.image)
        with engine.steps() as steps:
            together = engine.ask(long, *prompts)
        (reference,) = engine.ask(long)
        engine.forget()
        (again,) = engine.ask(long)
    assert max(steps, key=len) == steps[0]
    assert sorted(steps[0].values()) == sorted(
        [len(p) - h for p, h in ((a.prompt, a.hit) for a in together)]
    )
    assert [a.hit for a in together] == [0, *[IMAGE_TOKENS] * 3]
    assert reference.hit > IMAGE_TOKENS
    for one, other in zip(together[1:], alone, strict=True):
        assert one.tokens == other.tokens
        assert distance(one, other) < NOISE
    # The cold one's first token comes from exact prefill.
    first, expected = together[0].logprobs[0], again.logprobs[0]
    assert first.keys() == expected.keys()
    assert all(abs(first[t] - expected[t]) < NOISE for t in first)


@BITS
def test_abort_then_again(model, questions, bits: int) -> None:
    from vllm import SamplingParams

    question = questions[0]
    with Engine(model, f"calibquant{bits}", max_num_batched_tokens=IMAGE_TOKENS) as engine:
        prompt = engine.prompt(question.question, question.image)
        llm_engine = engine.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
        for steps in (1, 2, 5):  # in the image, in the question, while decoding
            engine.forget()
            llm_engine.add_request("gone", prompt, params)
            for _ in range(steps):
                llm_engine.step()
            assert engine.pages_in_use > 0
            (request,) = engine.scheduler.requests.values()
            llm_engine.abort_request([request.request_id], internal=True)
            assert engine.pages_in_use == 0
            assert all(m.ledger.held_pages == 0 for m in engine.scheduler.mixed_page_managers)
        again, warm = engine.ask(prompt)[0], engine.ask(prompt)[0]
        assert again.hit == warm.hit == IMAGE_TOKENS
        assert again.said == warm.said
        engine.forget()
        assert distance(engine.ask(prompt)[0], again) < (NOISE if bits == 4 else 0.2)


@pytest.mark.parametrize("exact", [(), (0, 4)])
@BITS
def test_pool_of_poison(model, questions, bits: int, exact: tuple[int, ...]) -> None:
    """Bytes that a page held before never show: 0xFF reads as NaN, and 0 * NaN is no 0.

    Nor in layers left at 16 bits, which share the pool.
    """
    with Engine(model, f"calibquant{bits}", {"layers_16bit": exact}) as engine:
        prompts = [
            *map(engine.prompt, TEXTS[:3]),
            *[engine.prompt(q.question, q.image) for q in questions[:6:2]],
        ]

        def ask() -> list:
            engine.forget()
            return [a.said for a in (*engine.ask(*prompts), *engine.ask(*prompts))]

        engine.ask(*prompts)  # the vision tower runs once and is remembered
        clean = ask()
        for cache in engine.caches:
            cache.view(torch.uint8).fill_(0xFF)
        assert engine.caches[0].isnan().all()
        assert ask() == clean


# Other codes.


@BITS
def test_chunks_that_cut_an_image(model, readings, bits: int) -> None:
    """Small chunks make other pages than one of 576 tokens, with other ranges.

    The bounds are on the given answers' tokens: the largest difference at 2 and 4 bits, and at
    1 bit, where single tokens hang by a thread, the mean one.
    """
    scores, pages = {}, {}
    one_of_each = readings[::2]
    small = 40 if bits == 4 else 100  # at 4 bits, a larger chunk is clipped to whole pages
    for budget in (IMAGE_TOKENS, small):
        with Engine(model, f"calibquant{bits}", max_num_batched_tokens=budget) as engine:
            ledger = engine.scheduler.mixed_page_managers[0].ledger
            written, pages[budget] = ledger.written, []

            def note(page, slots, written=written, seen=pages[budget]) -> None:
                seen.append(slots)
                written(page, slots)

            ledger.written = note
            scores[budget] = [
                engine.score(engine.prompt(q.question, q.image), q.answer) for q in one_of_each
            ]
    assert pages[small][:3] != pages[IMAGE_TOKENS][:3]
    differences = [
        abs(x - y)
        for one, other in zip(*scores.values(), strict=True)
        for x, y in zip(one, other, strict=True)
    ]
    if bits == 1:
        assert mean(differences) < 1.0
    else:
        assert max(differences) < {2: 0.1, 4: 0.01}[bits]


def test_concurrent_chunks(model, questions) -> None:
    """Prefill and decoding in one batch, chunked (vLLM #49011)."""
    with Engine(model, "calibquant4", max_num_batched_tokens=100, max_num_seqs=4) as engine:
        prompts = [engine.prompt(q.question, q.image) for q in questions]
        prompts[3:3] = map(engine.prompt, TEXTS[:3])
        with engine.steps() as steps:
            together = engine.ask(*prompts)
        assert any(min(s.values()) == 1 and max(s.values()) > 1 for s in steps)
        assert max(map(len, steps)) == 4
        assert engine.pages_in_use == 0
        engine.forget()
        alone = [engine.ask(prompt)[0] for prompt in prompts]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert max(map(distance, together, alone)) < 10 * NOISE
    assert [a.text for a in together[:3] + together[6:]] == [q.answer for q in questions]


PAST_THE_END = {"max_tokens": 24, "ignore_eos": True}
"""More than an answer takes: pages run out before it has ended."""


@pytest.fixture(scope="module")
def alone(model, readings) -> list[Answer]:
    """Answers that nothing disturbed, and no hit."""
    with Engine(model, "calibquant4", max_num_batched_tokens=IMAGE_TOKENS) as engine:
        prompts = [engine.prompt(q.question, q.image) for q in readings]
        answers = [engine.ask(prompt, **PAST_THE_END)[0] for prompt in prompts]
        assert engine.metric("vllm:num_preemptions") == 0
    return answers


@pytest.mark.parametrize("caching", [True, False])
def test_preempted(model, readings, alone, caching: bool) -> None:
    """Few pages: requests are thrown out while they answer, and computed again."""
    with Engine(
        model,
        "calibquant4",
        num_gpu_blocks_override=44,
        max_model_len=640,
        max_num_batched_tokens=IMAGE_TOKENS,
        enable_prefix_caching=caching,
    ) as engine:
        prompts = [engine.prompt(q.question, q.image) for q in readings]
        together = engine.ask(*prompts, **PAST_THE_END)
        assert engine.metric("vllm:num_preemptions") >= 5
        assert engine.pages_in_use == 0
        assert all(m.ledger.held_pages == 0 for m in engine.scheduler.mixed_page_managers)
    for one, other, question in zip(together, alone, readings, strict=True):
        assert one.text.startswith(question.answer)
        end = one.tokens.index(END) + 1
        assert one.tokens[:end] == other.tokens[:end]
        assert distance(one.first(end), other.first(end)) < 10 * NOISE


@pytest.fixture(scope="module")
def biased(model, tmp_path_factory) -> Path:
    return with_key_bias(model, tmp_path_factory.mktemp("biased") / "model", 40.0)


@pytest.fixture(scope="module")
def exact(biased, readings) -> list[Answer]:
    """Answers of stock vLLM with biased keys."""
    with Engine(biased) as engine:
        return [engine.ask(engine.prompt(q.question, q.image))[0] for q in readings]


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_with_offsets(biased, exact, readings, bits: int) -> None:
    """Keys with a large bias in slow channels, as Qwen2.5-VL has (vLLM #41343 is fp8 losing them).

    The bias is the same for all tokens and turns little with their positions, so exact attention
    gives nearly the same answers with it as without.
    """
    assert [a.text for a in exact] == [q.answer for q in readings]
    with Engine(biased, f"calibquant{bits}", max_num_batched_tokens=IMAGE_TOKENS) as engine:
        prompts = [engine.prompt(q.question, q.image) for q in readings]
        coded = [engine.ask(prompt)[0] for prompt in prompts]
        block = engine.visual_page_ids()[0]
        page = engine.caches[0][block].view(torch.uint8).flatten(1)
        ranges = PageFormat.uniform(64, bits, torch.float32).unpack_ranges(page)
    k_scale, k_offset = ranges[:, 0], ranges[:, 1]
    extent = k_scale * (2**bits - 1)
    assert ((k_offset.abs() > 4 * extent).sum(-1) >= 2).all()  # the canary does sing
    assert [a.text for a in coded] == [q.answer for q in readings]
    assert max(map(distance, coded, exact)) < {2: 0.05, 4: NOISE}[bits]


def with_key_bias(model: Path, out: Path, bias: float) -> Path:
    """A copy of the model whose keys have a bias in the slowest channels of every head."""
    config = json.loads((model / "config.json").read_text())
    text = config["text_config"]
    text["attention_bias"] = True
    shutil.copytree(model, out)
    (out / "config.json").write_text(json.dumps(config))
    weights = load_file(out / "model.safetensors")
    for name in [n for n in weights if "language_model" in n and "self_attn" in n]:
        extra = torch.zeros(weights[name].shape[0], dtype=weights[name].dtype)
        if "k_proj" in name:
            half = text["head_dim"] // 2
            extra.unflatten(0, (-1, 2, half))[:, 0, -2:] = bias
        weights[name.replace("weight", "bias")] = extra
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


# Settings.


def loss(scores: list[list[float]]) -> float:
    """How unlikely the right answers are: the mean over questions of the mean over tokens."""
    return -mean(map(mean, scores))


def test_settings_change_results(model, stock, readings) -> None:
    """Each in the direction that is known of this model (tests/tinyvlm/README.md)."""
    paper = {"preset": "calibquant-paper"}
    ends = {**paper, "key_range_factor": 1.0, "value_range_factor": 1.0}
    losses, answers = {"stock": loss(stock["score"])}, {}
    for name, calibquant in {
        "default": {},
        "calibrated": {"calibration": True},
        "unbiased slope": {"range_estimator": "unbiased-slope"},
        "two means": {"range_estimator": "two-means"},
        "paper": paper,
        "wider values": {**paper, "value_range_factor": 0.6},
        "range ends": ends,
        "quantiles": {**ends, "range_estimator": "quantile"},
        "other quantiles": {**ends, "range_estimator": "quantile", "quantile": 0.1},
        "first half exact": {"layers_16bit": [0, 1, 2]},
        "all but one exact": {"layers_16bit": [0, 1, 2, 3, 4]},
    }.items():
        budget = IMAGE_TOKENS
        with Engine(model, "calibquant1", calibquant, max_num_batched_tokens=budget) as engine:
            scores, answers[name] = [], []
            for question in readings:  # each image is encoded once: there is room for one
                prompt = engine.prompt(question.question, question.image)
                scores.append(engine.score(prompt, question.answer))
                answers[name] += engine.ask(prompt)
            losses[name] = loss(scores)
        # What was scored is found again; layers at 16 bits take no hits away.
        assert [a.hit for a in answers[name]] == [IMAGE_TOKENS] * len(readings)
    assert len({*losses.values()}) == len(losses)
    assert losses["stock"] < losses["all but one exact"] < losses["first half exact"]
    assert losses["first half exact"] < losses["default"]
    assert losses["default"] < losses["paper"] < losses["range ends"]
    assert losses["wider values"] < losses["paper"]
    assert losses["unbiased slope"] < losses["two means"]
    assert losses["default"] < losses["quantiles"] < losses["range ends"]
    texts = [a.text for a in answers["all but one exact"]]
    assert texts == [q.answer for q in readings]
