"""The CUDA backend inside vLLM: text as stock, codes as the reference, and both in graphs.

Everything here needs a GPU.  The small model has head size 64; the layer-by-layer comparison adds
the shape of LLaVA-1.5-7B (32 layers, head size 128) with dummy weights where the GPU has memory for
it, and ``GPU_MODELS=internvl3-8b,internvl2.5-26b`` adds others.  The worst cosine similarity of
each model and width is printed at the end of the run (``conftest.py``).
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import jit

from benchmarks.models import image_placeholder, make_model, noise_image
from tests.serving.engine import Answer, Engine, distance
from tests.tinyvlm.dataset import examples
from tests.tinyvlm.profiles import profile_path
from tests.tinyvlm.unpack import model_path
from vllm_calibquant.block_rows import BlockRows

pytestmark = pytest.mark.gpu

GRAPHS = {"enforce_eager": False, "max_num_seqs": 32, "dtype": "bfloat16"}
EAGER = {"enforce_eager": True, "max_num_seqs": 32, "dtype": "bfloat16"}
PROFILE = "calibquant1 with a profile"
PAPER = "calibquant1 as published"
TURNED = "calibquant1 transformed"
EXACT = (0, 1, 2)
BESIDE = f"calibquant1 beside layers {EXACT} at 16 bits"
OPTIONS = {
    PROFILE: {"profile": str(profile_path(1.25))},
    BESIDE: {"layers_16bit": EXACT},
    PAPER: {"preset": "calibquant-paper"},  # with calibration
    TURNED: {"transform": "hadamard"},
}
"""Our settings beside the first word, which is the KV cache dtype."""
TEXTS = ("How many red circles?", "What is the serial? " * 20, "Read line 3.\n" * 40)


def start(path: Path, kind: str, **settings: Any) -> Engine:
    """An engine of a KV cache dtype, or of one of :data:`OPTIONS`."""
    settings = {"gpu_memory_utilization": 0.3, **settings}  # the GPU may have other work
    return Engine(path, kind.split()[0], OPTIONS.get(kind), **settings)


def run(kind: str, **settings: Any) -> dict[str, list[Answer]]:
    """Answers of one engine: text alone, images cold, the same images again, other questions."""
    questions = list(examples("test", 7, 4))
    with start(model_path(), kind, kv_cache_memory_bytes=1 << 28, **settings) as engine:
        texts = [engine.prompt(text) for text in TEXTS]
        images = [engine.prompt(q.question, q.image) for q in questions]
        other = [engine.prompt("Read line 1.", q.image) for q in questions]
        two = engine.chat(["What is the date?", (5, 2), "Read line 2."], questions[0].image)
        return {
            "text": engine.ask(*texts, max_tokens=48, ignore_eos=True),
            "one": engine.ask(images[0]),
            "cold": engine.ask(*images),
            "warm": engine.ask(*images),
            "other": engine.ask(*other),
            "mixed": engine.ask(two, texts[0], other[1], images[2], texts[2]),
        }


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str, bool], dict[str, list[Answer]]]:
    """Answers of all engines, by dtype and whether CUDA graphs were on."""
    found = {}
    for dtype in ("auto", "calibquant1", "calibquant2", "calibquant4", PROFILE, BESIDE):
        found[dtype, False] = run(dtype, **EAGER)
    for dtype in ("auto", "calibquant1", PROFILE, BESIDE):
        found[dtype, True] = run(dtype, **GRAPHS)
    return found


@pytest.mark.parametrize("dtype", ["calibquant1", PROFILE, BESIDE])
@pytest.mark.parametrize("graphs", [False, True])
def test_text_is_bit_identical_to_stock(answers, graphs, dtype):
    stock, ours = answers["auto", graphs], answers[dtype, graphs]
    assert [a.said for a in ours["text"]] == [a.said for a in stock["text"]]


@pytest.mark.parametrize("dtype", ["calibquant1", PROFILE, BESIDE])
@pytest.mark.parametrize("kind", ["cold", "warm", "other", "mixed"])
def test_graphs_give_the_tokens_of_eager_execution(answers, kind, dtype):
    eager, graphs = answers[dtype, False][kind], answers[dtype, True][kind]
    if dtype == BESIDE:
        # FlashAttention splits long sums otherwise in graphs.  Stock vLLM's tokens then differ by
        # up to 0.08 in log-probability (H200), and so do layers that are as in stock vLLM.
        worst = max(distance(a, b) for a, b in zip(graphs, eager, strict=True))
        assert worst < 0.2
    else:
        assert [a.tokens for a in graphs] == [a.tokens for a in eager]


def test_prefix_hits_are_those_of_stock(answers):
    for dtype in ("calibquant1", "calibquant2", "calibquant4", PROFILE):
        for kind in ("cold", "warm", "other", "mixed"):
            hits = [a.hit for a in answers[dtype, False][kind]]
            assert hits == [a.hit for a in answers["auto", False][kind]], (dtype, kind)
    assert all(a.hit >= 576 for a in answers["calibquant1", False]["warm"])


def test_wide_codes_answer_as_16_bits_do(answers):
    stock = answers["auto", False]
    for dtype, bound in (("calibquant4", 0.15), ("calibquant2", 2.0)):
        ours = answers[dtype, False]
        same = sum(a.text == b.text for a, b in zip(ours["cold"], stock["cold"], strict=True))
        assert same >= len(ours["cold"]) - (0 if dtype == "calibquant4" else 3)
        worst = max(distance(a, b) for a, b in zip(ours["cold"], stock["cold"], strict=True))
        assert worst < bound, dtype


@pytest.mark.parametrize("kind", ["calibquant1", BESIDE])
@pytest.mark.parametrize("settings", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_text_where_codes_were_is_that_of_stock(settings, kind, monkeypatch):
    rows = BlockRows()  # without the pages of other engines in this process
    monkeypatch.setattr("vllm_calibquant.compat.BLOCK_ROWS", rows)
    monkeypatch.setattr("vllm_calibquant.attention.cuda.BLOCK_ROWS", rows)
    settings = {**settings, "max_model_len": 1024}
    questions = list(examples("test", 9, 4))
    texts = [f"{i} {text}" for i in range(2) for text in TEXTS]
    with start(model_path(), "auto", **settings, kv_cache_memory_bytes=1 << 28) as engine:
        stock = engine.ask(*map(engine.prompt, texts), max_tokens=48, ignore_eos=True)
    with start(model_path(), kind, **settings, kv_cache_memory_bytes=8 << 20) as engine:
        for question in questions:
            engine.ask(engine.prompt(question.question, question.image))
        # Codes are any bytes: these read as NaN, in layers at 16 bits too, whose bytes they are.
        old = rows._code_pages.copy()
        assert len(old) > (20 if kind == BESIDE else 30)
        for cache in engine.caches[len(EXACT) if kind == BESIDE else 0 :]:
            cache.view(torch.uint8)[sorted(old)] = 0xFF
        engine.forget()
        ours = engine.ask(*map(engine.prompt, texts), max_tokens=48, ignore_eos=True)
        assert len(rows._code_pages) < len(old) - 10
    assert [a.said for a in ours] == [a.said for a in stock]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["calibquant2", PROFILE])
def test_tensor_parallel_ranks_answer_as_one(kind, monkeypatch):
    # To ask whether there is a GPU is enough to make processes that fork unfit for CUDA.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    questions = list(examples("test", 7, 2))
    with start(
        model_path(), kind, tensor_parallel_size=2, gpu_memory_utilization=0.3, **GRAPHS
    ) as engine:
        prompts = [engine.prompt(q.question, q.image) for q in questions]
        cold, warm = engine.ask(*prompts), engine.ask(*prompts)
    assert all(a.hit >= 576 for a in warm)
    for answers in (cold, warm):
        right = sum(a.text == q.answer for a, q in zip(answers, questions, strict=True))
        assert right >= len(questions) - 2


@pytest.mark.parametrize("kind", ["calibquant1", PAPER, TURNED, PROFILE])
def test_no_request_waits_for_a_compiler(kind, monkeypatch):
    """What the start compiles, counted without a GPU in ``tests/test_warmup.py``, is all."""
    for module in [m for name, m in sys.modules.items() if name.startswith("csrc_triton.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, jit.JITFunction):
                kernel.device_caches.clear()  # what engines before this one have compiled
    questions = list(examples("test", 9, 3))
    late = []
    with start(model_path(), kind, kv_cache_memory_bytes=1 << 28, **EAGER) as engine:
        compile_now = jit.JITFunction._do_compile

        def noted(self, *args, **kwargs):
            late.append(f"{self.fn.__module__}.{self.fn.__name__}")
            return compile_now(self, *args, **kwargs)

        monkeypatch.setattr(jit.JITFunction, "_do_compile", noted)
        images = [engine.prompt(q.question, q.image) for q in questions]
        texts = [engine.prompt(text) for text in TEXTS]
        engine.ask(images[0])
        engine.ask(images[0])
        engine.ask(*images, *texts, max_tokens=20)
        engine.ask(*(engine.prompt("Read line 1.", q.image) for q in questions), texts[0])
    assert not [name for name in late if name.startswith("csrc_triton")]


LARGE = ["llava-1.5-7b", *filter(None, os.environ.get("GPU_MODELS", "").split(","))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("tinyvlm", f"calibquant{bits}") for bits in (1, 2, 4)),
        ("tinyvlm", PROFILE),
        ("tinyvlm", PAPER),
        ("tinyvlm", TURNED),
        *((name, "calibquant1") for name in dict.fromkeys(LARGE)),
    ],
)
def test_every_layer_agrees_with_the_reference(name, dtype, tmp_path: Path, monkeypatch, findings):
    if name == "tinyvlm":
        path, settings = model_path(), {"kv_cache_memory_bytes": 1 << 28}
    else:
        if torch.cuda.mem_get_info()[1] < 40 << 30:
            pytest.skip("a model of real shape needs a GPU of 40 GiB")
        path = make_model(name, tmp_path / name)
        settings = {"load_format": "dummy", "kv_cache_memory_bytes": 1 << 31, "max_model_len": 4096}
    with start(path, dtype, max_num_batched_tokens=1500, **EAGER, **settings) as engine:
        similar = watch_layers(monkeypatch)  # not before: the start serves steps of nothing
        if name == "tinyvlm":
            prompts = [engine.prompt(q.question, q.image) for q in examples("test", 8, 2)]
            others = prompts[:1]
        else:

            def behind(text: str, image: int) -> dict[str, Any]:
                return {
                    "prompt": f"{text} {image_placeholder(name)} and then?",
                    "multi_modal_data": {"image": noise_image(name, image)},
                }

            texts = ("one", "another " * 30)
            prompts = [behind(text, i) for i, text in enumerate(texts)]
            others = [behind(texts[1], i) for i in (2, 3)]
        engine.ask(*prompts, max_tokens=6)  # cold, and 3328 tokens are cut into chunks
        engine.ask(*prompts, max_tokens=6)  # from the prefix cache
        engine.ask(*others, max_tokens=6)  # other images behind cached text
        layers = len(engine.caches)
    assert len(similar) == layers
    worst = {layer: min(values) for layer, values in similar.items()}
    findings.append(
        f"{name} {dtype}: {layers} layers, {len(similar[0])} calls each, "
        f"worst cosine {min(worst.values()):.6f}"
    )
    assert min(len(values) for values in similar.values()) > 5
    assert min(worst.values()) > 0.999, worst


def watch_layers(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """Compare each call of our layers with the reference in float32 on the same cache.

    Returns a mapping, filled later, from layer to the cosine similarity of each call.
    """
    from vllm_calibquant.attention import cuda
    from vllm_calibquant.attention.cpu import request_views
    from vllm_calibquant.attention.reference import VisualPages, mixed_attention

    similar: dict[int, list[float]] = defaultdict(list)
    order: dict[int, int] = {}
    forward, build = cuda.MixedCUDAImpl.forward, cuda.MixedCUDAMetadataBuilder._build
    batch: dict[str, Any] = {}

    def watched_build(self, common, *args, **kwargs):
        batch.update(
            table=common.block_table_tensor.cpu(),
            starts=common.query_start_loc.cpu(),
            lengths=common.seq_lens.cpu(),
            slots=self.kv_cache_spec.slots,
        )
        return build(self, common, *args, **kwargs)

    def watched(self, layer, query, key, value, kv_cache, metadata, output, *args, **kwargs):
        result = forward(
            self, layer, query, key, value, kv_cache, metadata, output, *args, **kwargs
        )
        if metadata is None or not metadata.visual:
            return result
        fmt, d = self.page_format.page, self.head_size
        raw = kv_cache.view(torch.uint8).flatten(2)
        slot = torch.arange(fmt.tokens) // 16
        expected = torch.empty_like(output, dtype=torch.float32)
        table, starts, lengths = batch["table"], batch["starts"], batch["lengths"]
        views = request_views(table, starts, lengths, block_size=16, slots=batch["slots"])
        for view in views:
            rows, chosen = kv_cache[view.text_pages.cuda()], view.text_tokens.cuda()
            cached_key, cached_value = (
                x.transpose(1, 2).flatten(0, 1)[chosen] for x in rows.split(d, dim=-1)
            )
            visual = None
            if len(view.visual_pages):
                used = view.visual_slots[:, slot].cuda()
                visual = VisualPages(raw[view.visual_pages.cuda()], used)
            expected[view.tokens] = mixed_attention(
                query[view.tokens],
                torch.cat([cached_key, key[view.tokens]]),
                torch.cat([cached_value, value[view.tokens]]),
                visual,
                page_format=fmt,
                scale=self.scale,
                calibration=self.calibration,
                basis=self.codec.basis,
            )
        n = int(starts[len(views)])
        cosine = torch.cosine_similarity(
            expected[:n].flatten(1), output[:n].float().flatten(1), dim=-1
        )
        similar[order.setdefault(id(self), len(order))].append(cosine.min().item())
        return result

    monkeypatch.setattr(cuda.MixedCUDAMetadataBuilder, "_build", watched_build)
    monkeypatch.setattr(cuda.MixedCUDAImpl, "forward", watched)
    return similar
