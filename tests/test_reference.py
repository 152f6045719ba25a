"""vLLM with ``calibquant1``, ``2`` and ``4`` against the equations in plain transformers.

Every style of checkpoint and every width answers four prompts that exercise the layout of visual
pages: an image at the very start, one in the middle of text, two images apart, and two next to each
other.  All are prefilled cold and in one chunk, so that decoding is where codes are read.  The rest
of the file shows that this comparison can fail: outputs depend on the images, on quantisation and
on every detail of the method, and greedy choices are clear enough to be compared.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.reference.checkpoints import IMAGE_PLACEHOLDER, STYLES, make_checkpoint, make_image
from tests.reference.oracle import (
    Generation,
    Method,
    Oracle,
    calibrate,
    fake_quantise,
    slots_per_page,
    visual_pages,
)

NUM_TOKENS = 64
# In log-probability.  Promised are 1e-3; float32 on the CPU keeps a hundredth of that.
TOLERANCE = 1e-4
SQUARE, WIDE = (448, 448), (448, 224)
SHAPES = ("start", "middle", "two", "adjacent")
TEXT = list(range(40, 60))
"""Tokens of some text, for comparisons of distributions that need no generation."""


def prompt(style: str, shape: str) -> tuple[str, list[Image.Image]]:
    image = IMAGE_PLACEHOLDER[style]
    square, wide = make_image(*SQUARE, seed=1), make_image(*WIDE, seed=2)
    return {
        "start": (f"{image}What is in this picture?\n", [square]),
        "middle": (f"The quick brown fox sees {image} and jumps over the dog. Why?\n", [wide]),
        "two": (f"First {image} then {image} which one is larger?\n", [square, wide]),
        # The same image twice: what is cached by content must still be two spans.
        "adjacent": (f"Compare {image}{image}, are they equal?\n", [wide, wide]),
    }[shape]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(style: str) -> Path:
        return make_checkpoint(style, tmp_path_factory.mktemp(style))

    return make


@pytest.fixture(scope="session")
def load(checkpoint: Callable[[str], Path]) -> Callable[[str], tuple]:
    """Return model and processor of a style."""

    def run(style: str) -> tuple:
        directory = checkpoint(style)
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
        return model, AutoProcessor.from_pretrained(directory)

    return run


@pytest.fixture(scope="session")
def oracle(load: Callable[[str], tuple]) -> Callable[[str, Method], Oracle]:
    """Return an oracle; those of a style share one model."""
    cached_load = cache(load)
    return lambda style, method: Oracle(*cached_load(style), method)


@dataclass(frozen=True)
class Answer:
    """What vLLM said: log-probabilities of the best candidates of each step."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]


@pytest.fixture(scope="module")
def serve(checkpoint: Callable[[str], Path]) -> Callable[..., dict[str, Answer]]:
    """Return vLLM's answers to all prompts, from an engine that lives only as long as needed."""

    @cache
    def run(style: str, bits: int, settings: str = "{}") -> dict[str, Answer]:
        from vllm import LLM, SamplingParams

        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            # Of the ten seconds from start to shutdown, six are full collections of the garbage
            # of a process that has imported all of vLLM.
            environment.setattr("gc.collect", lambda *_: 0)
            llm = LLM(
                str(checkpoint(style)),
                dtype="float32",
                kv_cache_dtype=f"calibquant{bits}" if bits else "auto",
                additional_config={"calibquant": json.loads(settings)},
                kv_cache_memory_bytes=64 << 20,
                max_model_len=2048,
                max_num_batched_tokens=4096,  # all prompts in one step, each in one chunk
                enable_prefix_caching=False,
                enforce_eager=True,
                limit_mm_per_prompt={"image": 2, "video": 0},
            )
            prompts = [prompt(style, shape) for shape in SHAPES]
            outputs = llm.generate(
                [
                    {"prompt": text, "multi_modal_data": {"image": images}}
                    for text, images in prompts
                ],
                SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5, ignore_eos=True),
                use_tqdm=False,
            )
            llm.llm_engine.engine_core.shutdown()
        return {
            shape: Answer(
                list(output.prompt_token_ids),
                list(output.outputs[0].token_ids),
                [
                    {token: entry.logprob for token, entry in candidates.items()}
                    for candidates in output.outputs[0].logprobs
                ],
            )
            for shape, output in zip(SHAPES, outputs, strict=True)
        }

    return run


def explain(oracle: Oracle, request: tuple, answer: Answer, hit: int = 0) -> Generation:
    """Score an answer's tokens, with close calls decided as vLLM did where this can be told.

    A number that lies in the middle between two codes, up to float32 noise, may be coded either way
    by a correct implementation: of the 100 000 numbers of a prompt, some tens at 4 bits.  Seen: one
    such number moved log-probabilities by 4e-2, and with it decided the other way they agreed to
    1e-5.  A wrong implementation is not rescued by these few numbers, each of which must bring
    the comparison nearer.
    """
    scored = oracle.score(*request, answer.token_ids, hit=hit)
    calls, flips = scored.close_calls, frozenset()
    for call in 2 * calls:  # twice, as a large effect may hide that a small one helps
        if differences(scored, answer).abs().max() <= TOLERANCE:
            break
        tried = flips ^ {call}
        other = oracle.score(*request, answer.token_ids, tried, hit)
        if differences(other, answer).norm() < differences(scored, answer).norm():
            scored, flips = other, tried
    return scored


def differences(scored: Generation, answer: Answer) -> torch.Tensor:
    return torch.tensor(
        [
            logprob - scored.logprobs[step, token].item()
            for step, candidates in enumerate(answer.logprobs)
            for token, logprob in candidates.items()
        ]
    )


def assert_equal(oracle: Oracle, request: tuple, answer: Answer) -> None:
    expected = explain(oracle, request, answer)
    assert answer.prompt_token_ids == expected.prompt_token_ids
    assert len(answer.token_ids) == NUM_TOKENS
    assert differences(expected, answer).abs().max() <= TOLERANCE
    # Equal tokens are a fair demand where no two candidates are within the tolerance.
    assert expected.margin > 1e-3, "choose another seed for this checkpoint"
    assert expected.logprobs.argmax(-1).tolist() == answer.token_ids
    assert len(set(answer.token_ids)) >= 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [0, 1, 2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_vllm_equals_equations(oracle, serve, style: str, bits: int, shape: str) -> None:
    """Zero bits is stock vLLM at full precision: prompts, images and positions agree."""
    answer = serve(style, bits)[shape]
    assert_equal(oracle(style, Method.default(bits)), prompt(style, shape), answer)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (
            {"preset": "calibquant-paper"},
            Method.paper(1),
        ),
        (
            {"preset": "calibquant-paper", "key_range_factor": 0.6, "tau_min": 0.5, "tau_max": 2.0},
            Method(1, 0.6, 0.3, calibrate=True, tau_min=0.5, tau_max=2.0),
        ),
        (
            {"range_estimator": "quantile", "quantile": 0.05, "calibration": False},
            Method(2, quantile=0.05),
        ),
        (
            # Scores of a head span 6 to 15 here: for half of them the slope is held at zero.
            {"calibration": True, "tau_max": 11.0, "layers_16bit": [1]},
            Method(4, calibrate=True, tau_max=11.0, about_midpoint=True, exact_layers=(1,)),
        ),
        (
            # All prompts are computed in one step; at 2 bits each fills two to five pages.
            {"preset": "calibquant-paper", "range_scope": "request"},
            Method(2, calibrate=True, per_request=True),
        ),
        (
            {"transform": "hadamard"},
            replace(Method.default(1), hadamard=True),
        ),
    ],
    ids=["paper", "factors", "quantile", "layers", "request", "transform"],
)
def test_vllm_equals_equations_with_settings(oracle, serve, settings, method, shape) -> None:
    answer = serve("llava", method.bits, json.dumps(settings))[shape]
    assert_equal(oracle("llava", method), prompt("llava", shape), answer)


PROFILE_BITS = (
    ((4,) * 4 + (3,) * 8 + (2,) * 16 + (1,) * 24 + (0,) * 12, (2,) * 16 + (1,) * 32 + (0,) * 16),
    ((4,) * 16 + (2,) * 16 + (1,) * 32, (1,) * 32 + (0,) * 32),
    ((2,) * 32 + (1,) * 32, (1,) * 64),
)
"""Of K and V in each layer of the LLaVA style: 96 + 64, 128 + 32 and 96 + 64 planes."""


def test_vllm_equals_equations_with_a_profile(checkpoint, oracle, tmp_path) -> None:
    """Mixed bits in random bases, cold and behind a prefix hit; its layer formats differ."""
    from vllm import EngineArgs, SamplingParams

    from tests.serving.engine import Answer as Served
    from tests.serving.engine import Engine
    from tests.test_profile import make_profile
    from vllm_calibquant.profile import ModelIdentity

    directory = checkpoint("llava")
    identity = ModelIdentity.of(EngineArgs(str(directory)).create_engine_config().model_config)
    path = tmp_path / "profile.safetensors"
    make_profile(identity, PROFILE_BITS, calibration=(0.5, 2.0)).save(path)
    requests = [prompt("llava", "start"), prompt("llava", "two")]
    text, images = requests[0]
    again = (f"{text}Answer at length.\n", images)
    with Engine(
        directory,
        "calibquant1",
        {"profile": str(path)},
        max_model_len=2048,
        max_num_batched_tokens=4096,
        limit_mm_per_prompt={"image": 2, "video": 0},
    ) as engine:
        params = SamplingParams(temperature=0, max_tokens=24, logprobs=5, ignore_eos=True)
        answers = [
            Served.of(engine.llm.generate(  # one by one: each is computed in a step of its own
                {"prompt": text, "multi_modal_data": {"image": images}}, params, use_tqdm=False
            )[0])
            for text, images in [*requests, again]
        ]  # fmt: skip
    assert [answer.hit for answer in answers] == [0, 0, 272]
    one = oracle(
        "llava", Method(1, calibrate=True, tau_min=0.5, tau_max=2.0, profile=path, slots=10)
    )
    for request, answer in zip([*requests, again], answers, strict=True):
        given = Answer(list(answer.prompt), list(answer.tokens), list(answer.logprobs))
        expected = explain(one, request, given, answer.hit)
        assert expected.prompt_token_ids == given.prompt_token_ids
        assert differences(expected, given).abs().max() <= TOLERANCE
        assert expected.logprobs.argmax(-1).tolist() == given.token_ids
    exact = oracle("llava", Method(0)).score(*again, answers[2].tokens, hit=272)
    assert (exact.logprobs - expected.logprobs).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_close_calls_rescue_no_error(oracle, bits: int) -> None:
    """The comparison accepts numbers coded the other way, and not a range that is 1 % off."""
    method = Method.default(bits)
    one = oracle("llava", method)
    # Which prompts have such numbers hangs on how the processor rounds.
    for shape in SHAPES:
        request = prompt("llava", shape)
        calls = one.score(*request, TEXT).close_calls[:8:2]
        if calls:
            break
    assert calls

    def answer(generation: Generation) -> Answer:
        values, tokens = generation.logprobs.topk(5)
        best = [
            dict(zip(ids, row, strict=True))
            for ids, row in zip(tokens.tolist(), values.tolist(), strict=True)
        ]
        return Answer(generation.prompt_token_ids, generation.token_ids, best)

    correct = answer(one.score(*request, TEXT, calls))
    assert differences(explain(one, request, correct), correct).abs().max() <= TOLERANCE
    wrong_method = replace(method, value_clip=method.value_clip * 0.99)
    wrong = answer(oracle("llava", wrong_method).score(*request, TEXT))
    assert differences(explain(one, request, wrong), wrong).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("style", STYLES)
def test_oracle_without_quantisation_is_transformers(load, oracle, style: str) -> None:
    request = text, images = prompt(style, "two")
    expected = oracle(style, Method(0)).generate(*request, NUM_TOKENS)
    model, processor = load(style)
    output = model.generate(
        **processor(text=[text], images=images, return_tensors="pt"),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=[],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[0, -NUM_TOKENS:].tolist() == expected.token_ids
    torch.testing.assert_close(
        torch.cat(output.logits).log_softmax(-1), expected.logprobs, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_scoring_is_generating(oracle, style: str, bits: int) -> None:
    """Given tokens get the distributions that decoding them one by one had."""
    one = oracle(style, Method.default(bits))
    generated = one.generate(*prompt(style, "two"), NUM_TOKENS)
    scored = one.score(*prompt(style, "two"), generated.token_ids)
    torch.testing.assert_close(scored.logprobs, generated.logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_images_matter(oracle, style: str) -> None:
    text, images = prompt(style, "start")
    one = oracle(style, Method(0)).score(text, images, TEXT)
    other = oracle(style, Method(0)).score(text, [make_image(*SQUARE, seed=3)], TEXT)
    assert other.prompt_token_ids == one.prompt_token_ids
    assert (other.logprobs - one.logprobs).abs().amax(-1).min() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_quantisation_matters(oracle, style: str, bits: int, shape: str) -> None:
    exact = oracle(style, Method(0)).score(*prompt(style, shape), TEXT)
    coded = oracle(style, Method.default(bits)).score(*prompt(style, shape), TEXT)
    # Prefill is exact: the second token is the first that is decoded from codes.
    torch.testing.assert_close(exact.logprobs[0], coded.logprobs[0], rtol=0, atol=1e-5)
    assert (exact.logprobs[1:] - coded.logprobs[1:]).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"key_clip": 0.6},
        {"value_clip": 0.4},
        {"calibrate": False},
        {"tau_max": 2.5},
        {"tau_min": 0.5},
        {"about_midpoint": True},
        {"per_request": True},
        {"hadamard": True},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("style", STYLES)
def test_every_setting_matters(oracle, style: str, change: dict) -> None:
    method = Method.paper(1)
    one = oracle(style, method).score(*prompt(style, "two"), TEXT)
    other = oracle(style, replace(method, **change)).score(*prompt(style, "two"), TEXT)
    assert (one.logprobs[1:] - other.logprobs[1:]).abs().amax(-1).min() > 1e-2


def test_slots_of_a_page() -> None:
    assert [slots_per_page(64, bits) for bits in (1, 2, 4)] == [14, 7, 3]
    assert [slots_per_page(128, bits) for bits in (1, 2, 4)] == [14, 7, 3]
    assert [slots_per_page(32, bits) for bits in (1, 2, 4)] == [14, 7, 3]
    assert slots_per_page(80, 1) == 10  # 80 planes are padded to 96, and 11 blocks to a pair
    assert slots_per_page(80, 2) == 6  # 160 planes are no multiple of 64: 7 blocks to a pair


def test_layout_of_pages() -> None:
    def image(tokens: int) -> list[bool]:
        return [True] * tokens

    def text(tokens: int) -> list[bool]:
        return [False] * tokens

    # Whole blocks only: 1 + 40 tokens reach into blocks 0, 1 and 2, and fill block 1 alone.
    assert visual_pages(text(1) + image(40), 14) == []
    assert visual_pages(text(1) + image(47), 14) == [[1, 2]]
    # Pages run on over text and the next image; blocks cut by text stay out.
    spans = text(4) + image(60) + text(1) + image(63)
    assert visual_pages(spans, 14) == [[1, 2, 3, 5, 6, 7]]
    assert visual_pages(spans, 4) == [[1, 2, 3, 5], [6, 7]]
    # Of two images side by side, the block that has tokens of both is visual.
    assert visual_pages(image(24) + image(24), 14) == [[0, 1, 2]]
    # A page of one block is not made.
    assert visual_pages(image(15 * 16), 14) == [list(range(14))]
    # A last block that is not full yet is not visual.
    assert visual_pages(image(40), 14) == [[0, 1]]


def test_fake_quantise_by_hand() -> None:
    x = torch.tensor([[-4.0, 1.0, 5.0], [-1.0, 1.0, 6.0], [0.0, 1.0, 7.0], [2.0, 1.0, 8.0]])
    # Range [-2, 1] and one threshold at -0.5; a constant channel; one whose codes all saturate.
    one_bit = torch.tensor([[-2.0, 0.5, 4.0], [-2.0, 0.5, 4.0], [1.0, 0.5, 4.0], [1.0, 0.5, 4.0]])
    assert torch.equal(fake_quantise(x, 1, 0.5), one_bit)
    # Range [-4, 2] in steps of 2: ties to even, as torch.round.
    assert fake_quantise(x, 2, 1.0)[:, 0].tolist() == [-4.0, 0.0, 0.0, 2.0]


def test_calibration_by_hand() -> None:
    scores = torch.tensor([[-4.0, 0.0, 6.0], [0.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
    expected = torch.tensor([[-4.0, -1.2, 3.0], [0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    torch.testing.assert_close(calibrate(scores, 0.0, 3.0), expected)
