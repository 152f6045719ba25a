"""What the 1-bit cache costs where it cannot help: lone requests and text, beside stock vLLM.

``python -m benchmarks.end_to_end`` runs one model of real shape with dummy weights under each KV
cache dtype in turn, on one GPU, and writes a record.  Each dtype has a process of its own, because
vLLM keeps a GPU's memory until its process ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models import NAMES, image_placeholder, make_model, noise_image
from benchmarks.records import print_table, write_record

DTYPES = ("auto", "fp8", "calibquant1")
TEXT_TOKENS, OUTPUT_TOKENS = 512, 128
METRICS = {
    "first_token_image_ms": "first token of a lone image request, ms",
    "first_token_text_ms": f"first token of a lone {TEXT_TOKENS}-token request, ms",
    "decode_step_text_ms": f"decode step at batch 1 after {TEXT_TOKENS} text tokens, ms",
    "decode_step_image_ms": "decode step at batch 1 after an image, ms",
    "text_tokens_per_s": f"text requests ({TEXT_TOKENS} in, {OUTPUT_TOKENS} out) in one batch, "
    "output tokens/s",
    "image_tokens_per_s": f"image requests from the prefix cache ({OUTPUT_TOKENS} out) in one "
    "batch, output tokens/s",
}


class Sizes(NamedTuple):
    """How much is measured."""

    text_requests: int = 128
    image_requests: int = 32
    lone_requests: int = 7
    repeats: int = 4


DRY_RUN = Sizes(4, 2, 1, 1)


def measure(
    name: str, directory: Path, kv_cache_dtype: str, sizes: Sizes, **settings: Any
) -> dict[str, Any]:
    """Raw samples of every metric, in this process.

    Parameters
    ----------
    name
        Model, one of :data:`benchmarks.models.NAMES`.
    directory
        Its checkpoint directory.
    kv_cache_dtype
        KV cache dtype to serve with.
    sizes
        How much to measure.
    settings
        Further arguments of :class:`vllm.LLM`.
    """
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        str(directory),
        load_format="dummy",
        dtype="bfloat16",
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=sizes.text_requests,
        limit_mm_per_prompt={"image": 1, "video": 0},
        **settings,
    )
    started = time.perf_counter() - begin

    def seconds(prompts: list[Any], tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == tokens for o in outputs)
        return elapsed

    def text(seed: int) -> dict[str, Any]:
        # Byte tokens; the first ones tell prompts apart, so that no prefix is shared.
        head = [seed % 200, seed // 200 % 200, seed // 40000 % 200]
        return {"prompt_token_ids": head + [(seed + i * i) % 200 for i in range(TEXT_TOKENS - 3)]}

    def image(seed: int) -> dict[str, Any]:
        return {
            "prompt": f"{image_placeholder(name)}what is it?",
            "multi_modal_data": {"image": noise_image(name, seed)},
        }

    seeds = iter(range(1, 1 << 20))
    for prompt in (text, image):  # compilation of kernels is no part of what is measured
        for _ in range(2):
            seconds([prompt(next(seeds))], 8)
    seconds([text(next(seeds)) for _ in range(sizes.text_requests)], 16)
    samples: dict[str, list[float]] = {
        "first_token_image_ms": [
            1e3 * seconds([image(next(seeds))], 1) for _ in range(sizes.lone_requests)
        ],
        "first_token_text_ms": [
            1e3 * seconds([text(next(seeds))], 1) for _ in range(sizes.lone_requests)
        ],
    }
    for metric, prompt in (("decode_step_text_ms", text), ("decode_step_image_ms", image)):
        samples[metric] = []
        for _ in range(sizes.repeats):
            same = [prompt(next(seeds))]
            seconds(same, 1)  # afterwards its prompt comes from the prefix cache
            short, long = seconds(same, 1), seconds(same, 1 + OUTPUT_TOKENS)
            samples[metric].append(1e3 * (long - short) / OUTPUT_TOKENS)
    samples["text_tokens_per_s"] = []
    for _ in range(sizes.repeats):
        batch = [text(next(seeds)) for _ in range(sizes.text_requests)]
        elapsed = seconds(batch, OUTPUT_TOKENS)
        samples["text_tokens_per_s"].append(len(batch) * OUTPUT_TOKENS / elapsed)
    same = [image(next(seeds)) for _ in range(sizes.image_requests)]
    seconds(same, 1)
    samples["image_tokens_per_s"] = [
        len(same) * OUTPUT_TOKENS / seconds(same, OUTPUT_TOKENS) for _ in range(sizes.repeats)
    ]
    return {"start_s": started, "samples": samples}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default="internvl3-8b")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="KV cache dtypes, stock first")
    parser.add_argument("--settings", type=json.loads, default={}, help="further LLM arguments")
    parser.add_argument("--dry-run", action="store_true", help="few requests: does it run at all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="folder of the record")
    args = parser.parse_args()
    settings = {"max_model_len": 8192, "gpu_memory_utilization": 0.7, **args.settings}
    sizes = DRY_RUN if args.dry_run else Sizes()
    if args.one:
        directory = Path(args.one)
        result = measure(args.model, directory, args.dtypes, sizes, **settings)
        (directory / f"result-{args.dtypes}.json").write_text(json.dumps(result))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = make_model(args.model, folder)
        for dtype in args.dtypes.split(","):
            command = [sys.executable, "-m", "benchmarks.end_to_end", "--one", folder]
            command += ["--model", args.model, "--dtypes", dtype]
            command += ["--settings", json.dumps(args.settings)]
            command += ["--dry-run"] * args.dry_run
            subprocess.run(command, check=True)
            results[dtype] = json.loads((directory / f"result-{dtype}.json").read_text())
    path = write_record(
        "end-to-end",
        {"model": args.model, "settings": settings, "sizes": sizes._asdict(), "results": results},
        args.out,
    )
    stock = next(iter(results))
    rows = []
    for metric, label in METRICS.items():
        medians = [statistics.median(r["samples"][metric]) for r in results.values()]
        ratios = [f"{m / medians[0]:.3f}" for m in medians[1:]]
        rows.append([label, *(f"{m:.2f}" for m in medians), *ratios])
    print_table([args.model, *results, *(f"{d} / {stock}" for d in list(results)[1:])], rows)
    print(path)


if __name__ == "__main__":
    main()
