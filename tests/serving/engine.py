"""An engine in this process, with what tests look at besides its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

BLOCK = 16
IMAGE_TOKENS = 576
"""Visual tokens of an image in the tiny model: positions 1 to 576, after the begin token."""
BEGIN, END, IMAGE = 1, 2, 4
"""Token ids of the tiny model."""


@dataclass(frozen=True)
class Answer:
    """What one request came back with."""

    text: str
    prompt: tuple[int, ...]
    """Its prompt's tokens, with one for every visual token."""
    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    """Of the most likely candidates of each generated token."""
    hit: int
    """Prompt tokens that came from the prefix cache."""

    @classmethod
    def of(cls, output: Any) -> Answer:
        """From vLLM's RequestOutput."""
        first = output.outputs[0]
        return cls(
            first.text,
            tuple(output.prompt_token_ids),
            tuple(first.token_ids),
            tuple({t: p.logprob for t, p in step.items()} for step in first.logprobs),
            output.num_cached_tokens,
        )

    def first(self, tokens: int) -> Answer:
        """Its first tokens alone."""
        return replace(self, tokens=self.tokens[:tokens], logprobs=self.logprobs[:tokens])

    @property
    def said(self) -> tuple[tuple[int, ...], tuple[dict[int, float], ...]]:
        """Tokens and log-probabilities: what must be equal where answers must be."""
        return self.tokens, self.logprobs


def distance(one: Answer, other: Answer) -> float:
    """Largest difference of log-probabilities, over the tokens before the answers part.

    A candidate that only one side lists counts with the other side's smallest.
    """
    worst = 0.0
    for a, b, x, y in zip(one.logprobs, other.logprobs, one.tokens, other.tokens, strict=False):
        for token in (x, y):
            p, q = a.get(token, min(a.values())), b.get(token, min(b.values()))
            worst = max(worst, abs(p - q))
        if x != y:
            break
    return worst


@contextmanager
def no_collections() -> Iterator[None]:
    """Leave out the garbage collections that vLLM asks for when an engine starts and ends.

    There are eight, and a process that has imported all of vLLM takes a third of a second for each.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


class Engine:
    """vLLM's ``LLM`` on the tiny model in float32, without a process of its own."""

    def __init__(
        self,
        model: Path,
        kv_cache_dtype: str = "auto",
        calibquant: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        from vllm import LLM

        if calibquant is not None:
            settings["additional_config"] = {"calibquant": calibquant}
        with pytest.MonkeyPatch.context() as environment, no_collections():
            environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            self.llm = LLM(
                str(model),
                kv_cache_dtype=kv_cache_dtype,
                **{
                    "dtype": "float32",
                    "enforce_eager": True,
                    "max_model_len": 2048,
                    "kv_cache_memory_bytes": 64 << 20,
                    "disable_log_stats": False,
                    **settings,
                },
            )
        self.tokenizer = self.llm.get_tokenizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        """Free the pool; another engine may start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        with no_collections():
            self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def prompt(self, text: str, *images: Image.Image) -> dict[str, Any]:
        """Ask the text, after the images."""
        return self.chat([text], *images)

    def chat(self, turns: Sequence[str | Sequence[int]], *images: Image.Image) -> dict[str, Any]:
        """A chat: questions as strings, answers in between as the tokens that were generated.

        Tokens, because text that is taken apart again may come back as other tokens.
        """
        tokens = [BEGIN] + [IMAGE] * len(images)
        for turn in turns:
            if isinstance(turn, str):
                tokens += self.tokenizer.encode(f"{turn}\n", add_special_tokens=False)
            else:
                tokens += turn
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if images:
            prompt["multi_modal_data"] = {"image": list(images)}
        return prompt

    def ask(self, *prompts: dict[str, Any], **sampling: Any) -> list[Answer]:
        """Answer greedily, all prompts at once."""
        from vllm import SamplingParams

        params = SamplingParams(**{"temperature": 0, "max_tokens": 20, "logprobs": 5, **sampling})
        outputs = self.llm.generate(list(prompts), params, use_tqdm=False)
        return [Answer.of(output) for output in outputs]

    def score(self, prompt: dict[str, Any], answer: str) -> list[float]:
        """Log-probabilities of the tokens of a given answer.

        They come with the prompt, whose later chunks read codes.  vLLM skips the prefix cache here.
        """
        tokens = self.tokenizer.encode(answer, add_special_tokens=False)
        prompt = {**prompt, "prompt_token_ids": prompt["prompt_token_ids"] + tokens}
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate([prompt], params, use_tqdm=False)
        scored = output.prompt_logprobs[-len(tokens) :]
        return [step[token].logprob for step, token in zip(scored, tokens, strict=True)]

    @contextmanager
    def steps(self) -> Iterator[list[dict[str, int]]]:
        """Collect what every step schedules: tokens of each request."""
        schedule = self.scheduler.schedule
        seen: list[dict[str, int]] = []

        def recording(*args: Any) -> Any:
            output = schedule(*args)
            seen.append(dict(output.num_scheduled_tokens))
            return output

        self.scheduler.schedule = recording
        try:
            yield seen
        finally:
            self.scheduler.schedule = schedule

    @property
    def scheduler(self) -> Any:
        """The scheduler, which is in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self) -> Any:
        """The model runner, which is in this process."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def caches(self) -> list[torch.Tensor]:
        """KV cache of each layer."""
        return self.runner.kv_caches

    @property
    def pages_in_use(self) -> int:
        """Pages that are not free."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def visual_page_ids(self) -> list[int]:
        """Visual pages that hold codes, in use or in the prefix cache."""
        return [page for m in self.scheduler.mixed_page_managers for page in m.ledger._slots]

    def metric(self, name: str) -> float:
        """Sum of a counter or gauge of vLLM."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.reset_prefix_cache()
