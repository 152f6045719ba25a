"""Who is asked: a vLLM in this process, or a server with an OpenAI-compatible API."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import uuid
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from benchmarks.accuracy_data import Chat
from vllm_calibquant.config import SECTION, bits_of
from vllm_calibquant.profile import load_profile

FORCED = "forced_tokens"
"""Key of a request's ``extra_args`` for the processors of :mod:`benchmarks.accuracy_forcing`."""

CANDIDATES = 20
"""Most likely tokens that each side of a divergence lists; vLLM gives no more unless told to."""


@dataclass(frozen=True)
class Setting:
    """A KV cache dtype and our settings beside it, as ``calibquant1 calibration=false``."""

    name: str
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Parse a dtype and ``key=JSON`` pairs between spaces."""
        dtype, *pairs = text.split()
        options = {}
        for pair in pairs:
            key, _, value = pair.partition("=")
            try:
                options[key] = json.loads(value)
            except json.JSONDecodeError:
                options[key] = value  # a bare word, such as quantile
        return cls(" ".join(text.split()), dtype, options)

    @property
    def bits(self) -> float:
        """Bits per number of a visual token, on average."""
        if "profile" in self.options:
            return load_profile(self.options["profile"]).average_bits
        return bits_of(self.dtype) or (8 if self.dtype.startswith("fp8") else 16)


class Answer(NamedTuple):
    """A greedy answer."""

    text: str
    tokens: tuple[Hashable, ...]
    hit: int | None
    """Prompt tokens that came from the prefix cache; None where the server does not say."""


class Engine(Protocol):
    """What a measurement needs of an engine."""

    def ask(self, chats: Sequence[Chat]) -> list[Answer]:
        """Answer greedily, all chats at once."""

    def look(self, chats: Sequence[Chat]) -> None:
        """Put the images of chats into the prefix cache."""

    def forget(self) -> None:
        """Let nothing that was asked before be found in the prefix cache."""


class InProcess:
    """vLLM's ``LLM``, without a process of its own."""

    def __init__(self, model: str, setting: Setting, max_tokens: int, **settings: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.platforms import current_platform

        # Model runner V2, which CPUs do not have, has processors of another kind.
        processor = "ForcedTokens" if current_platform.is_cpu() else "ForcedTokensV2"
        if setting.options:
            settings["additional_config"] = {SECTION: setting.options}
        self.max_tokens = max_tokens
        if setting.dtype == "int4_per_token_head":
            _rotate_soundly()
        with _flash_version(setting.dtype):
            self.llm = LLM(
                model,
                kv_cache_dtype=setting.dtype,
                logits_processors=[f"benchmarks.accuracy_forcing:{processor}"],
                **settings,
            )
        self.tokenizer = self.llm.get_tokenizer()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()

    def ask(self, chats: Sequence[Chat]) -> list[Answer]:
        """Answer greedily; see :class:`Engine`."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=self.max_tokens)
        outputs = self.llm.chat(list(chats), params, use_tqdm=False)
        return [
            Answer(o.outputs[0].text, tuple(o.outputs[0].token_ids), o.num_cached_tokens)
            for o in outputs
        ]

    def look(self, chats: Sequence[Chat]) -> None:
        """Put images into the prefix cache; see :class:`Engine`."""
        from vllm import SamplingParams

        self.llm.chat(list(chats), SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)

    def forget(self) -> None:
        """Empty the prefix cache."""
        for _ in range(3):
            if self.llm.reset_prefix_cache():
                return
            self.llm.llm_engine.step()  # one that was scheduled ahead may still hold pages
        raise RuntimeError("vLLM did not reset its prefix cache")

    def distributions(
        self, chats: Sequence[Chat], answers: Sequence[str]
    ) -> list[list[dict[int, float]]]:
        """Log-probabilities of the most likely tokens at each token of given answers.

        The end of an answer counts as a token.
        """
        from vllm import SamplingParams

        forced = [self.tokenizer.encode(a, add_special_tokens=False) for a in answers]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=len(tokens) + 1,
                ignore_eos=True,
                logprobs=CANDIDATES,
                detokenize=False,
                extra_args={FORCED: tokens},
            )
            for tokens in forced
        ]
        outputs = [o.outputs[0] for o in self.llm.chat(list(chats), params, use_tqdm=False)]
        for tokens, output in zip(forced, outputs, strict=True):
            if list(output.token_ids[:-1]) != tokens:
                raise RuntimeError(f"vLLM generated {output.token_ids}, not the forced {tokens}")
        return [[{t: p.logprob for t, p in s.items()} for s in o.logprobs] for o in outputs]

    @property
    def bytes_per_visual_token(self) -> float:
        """KV cache of a visual token in a full page, all layers and heads."""
        core = self.llm.llm_engine.engine_core.engine_core
        groups = core.scheduler.kv_cache_config.kv_cache_groups
        # A group of layers with pages of different sizes has a spec for each of them.
        specs = [
            getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            for group in groups
            for name in group.layer_names
        ]
        return sum(s.page_size_bytes / (s.block_size * getattr(s, "slots", 1)) for s in specs)


def _rotate_soundly() -> None:
    """Let ``int4_per_token_head`` rotate by a product with the Hadamard matrix.

    The CUDA kernel that vLLM 0.32 prefers transforms 256 numbers at a time.  Where an odd number of
    such pieces comes, as with 2 heads of 64 and most numbers of tokens, the last one may be read
    before it is there (vLLM issue 57014), and what is not finite then ends the engine.
    """
    from vllm.v1.attention.ops import int4_per_token_head

    int4_per_token_head._HADACORE_AVAILABLE = False


@contextmanager
def _flash_version(dtype: str) -> Iterator[None]:
    """Let TurboQuant use :data:`benchmarks.serving_engine.FORCED_FLASH_VERSION`."""
    if not dtype.startswith("turboquant"):
        yield
        return
    from vllm.engine.arg_utils import EngineArgs

    from benchmarks.serving_engine import FORCED_FLASH_VERSION

    create = EngineArgs.create_engine_config

    def forced(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        config.attention_config.flash_attn_version = FORCED_FLASH_VERSION
        return config

    EngineArgs.create_engine_config = forced  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineArgs.create_engine_config = create  # type: ignore[method-assign]


class Server:
    """A server with an OpenAI-compatible API.

    Cold questions and prefix hits are told apart by vLLM's ``cache_salt``, a parameter that other
    servers ignore or refuse: there, every question after the first on an image may be a prefix hit.
    """

    def __init__(self, url: str, max_tokens: int, in_flight: int) -> None:
        import openai

        self.client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
        self.model = next(iter(self.client.models.list())).id
        self.max_tokens, self.in_flight = max_tokens, in_flight
        self.refuses_salt = False
        self.forget()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def _one(self, chat: Chat, max_tokens: int) -> Answer:
        import openai

        salted = not self.refuses_salt
        try:
            done = self.client.chat.completions.create(
                model=self.model,
                messages=[_encoded(message) for message in chat],
                temperature=0,
                max_tokens=max_tokens,
                logprobs=True,  # the way to see tokens
                extra_body={"cache_salt": self.salt} if salted else None,
            )
        except openai.BadRequestError as error:
            if not salted or "cache_salt" not in str(error):
                raise
            self.refuses_salt = True
            return self._one(chat, max_tokens)
        choice, details = done.choices[0], done.usage and done.usage.prompt_tokens_details
        tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
        hit = details.cached_tokens if details else None
        return Answer(choice.message.content or "", tuple(t.token for t in tokens), hit)

    def _all(self, chats: Sequence[Chat], max_tokens: int) -> list[Answer]:
        with ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(self._one, chats, [max_tokens] * len(chats)))

    def ask(self, chats: Sequence[Chat]) -> list[Answer]:
        """Answer greedily; see :class:`Engine`."""
        return self._all(chats, self.max_tokens)

    def look(self, chats: Sequence[Chat]) -> None:
        """Put images into the prefix cache; see :class:`Engine`."""
        self._all(chats, 1)

    def forget(self) -> None:
        """Use another salt from now on."""
        self.salt = uuid.uuid4().hex


def _encoded(message: dict[str, Any]) -> Any:
    """A message with its images as data URLs."""
    if isinstance(message["content"], str):
        return message
    parts = []
    for part in message["content"]:
        if part["type"] == "image_pil":
            with io.BytesIO() as file:
                part["image_pil"].save(file, "PNG")
                data = base64.b64encode(file.getvalue()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        parts.append(part)
    return {**message, "content": parts}
