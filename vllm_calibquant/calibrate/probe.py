"""A real vLLM in this process whose attention layers are watched and whose codecs can be changed.

Prompts are computed one at a time, each in one step: what a layer sees of a step is one prompt, all
of its keys and values at full precision, and its slot mapping says which tokens went to which
visual page.  Small models leave a GPU idle meanwhile, so that nothing but the number of kernels and
of waits for the GPU decides how fast that is.  Three things are done with a step:

* the layers as they are, with no modality in codes: answers at 16 bits;
* :class:`~vllm_calibquant.calibrate.moments.Moments` of every layer;
* attention as after a prefix hit: all tokens behind the last visual page read the pages, which the
  step itself has just written with the codec under test.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from vllm_calibquant import compat
from vllm_calibquant.attention.reference import Calibration, VisualPages, mixed_attention
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.calibrate.moments import Moments
from vllm_calibquant.calibrate.prompts import Prompt
from vllm_calibquant.config import SECTION, ConfigError
from vllm_calibquant.format import BLOCK_SIZE
from vllm_calibquant.tags import is_visual, page_of, slot_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_calibquant.profile import Profile

BATCH = 16
"""Prompts whose images are prepared together."""
CANDIDATES = 1024
"""Most likely tokens of the 16-bit model that a divergence tells apart."""
OUTPUT_NAMES = ("o_proj", "out_proj", "wo", "dense", "proj", "c_proj")
"""What models call the linear layer behind attention."""

Mode = Literal["exact", "moments", "codes"]


@dataclass
class Reference:
    """The 16-bit model's view of the tokens that are scored in one prompt."""

    tokens: torch.Tensor
    """int64 ``[T, K]``: most likely next tokens."""
    logprobs: torch.Tensor
    """float32 ``[T, K]``."""


class Answer(NamedTuple):
    """What the 16-bit model says."""

    text: str
    prompt_tokens: int
    """Tokens of the question with its images, before the answer's."""


@dataclass(frozen=True)
class Score:
    """How far a codec's answers are from those at 16 bits."""

    kl: float
    """Mean divergence of the next-token distribution, nats."""
    agreement: float
    """Share of positions with the same most likely token."""
    answers: float
    """Share of prompts where it is the same everywhere: the greedy answer is then the same."""


@dataclass(frozen=True)
class Places:
    """Where the tokens of a step that computes one prompt have gone.

    Found on the host, with one wait for the GPU, and the same for all layers that share a block
    table.
    """

    tokens: int
    """Of the prompt; behind them may be padding."""
    behind: int
    """First token behind the last visual one; 0 where there is none."""
    visual: torch.Tensor
    """int64 ``[N]``: tokens in visual pages."""
    text: torch.Tensor
    """int64: all others."""
    pages: torch.Tensor
    """int64 ``[P]``: the pages."""
    page: torch.Tensor
    """int64 ``[N]``: for each visual token, which of :attr:`pages` has it."""
    offset: torch.Tensor
    """int64 ``[N]``: and at which token of the page."""
    used: torch.Tensor
    """bool ``[P, tokens of a page]``."""

    @classmethod
    def of(cls, slot_mapping: torch.Tensor, page_tokens: int) -> Places:
        """Places of a step's slots; tensors are on their device."""
        slots = slot_mapping.cpu()
        slots = slots[slots >= 0].long()  # padding comes last
        blocks = slots // BLOCK_SIZE
        coded = is_visual(blocks)
        visual, text = coded.nonzero().flatten(), (~coded).nonzero().flatten()
        behind = int(visual[-1]) + 1 if len(visual) else 0
        slots, blocks = slots[visual], blocks[visual]
        pages, page = torch.unique(page_of(blocks), return_inverse=True)
        offset = slot_of(blocks) * BLOCK_SIZE + slots % BLOCK_SIZE
        parts = (visual, text, pages, page, offset)
        there = torch.cat(parts).to(slot_mapping.device)  # at once: each copy is waited for
        visual, text, pages, page, offset = there.split([len(part) for part in parts])
        used = torch.zeros(len(pages), page_tokens, dtype=torch.bool, device=there.device)
        used[page, offset] = True
        return cls(len(coded), behind, visual, text, pages, page, offset, used)

    def read(self, kv_cache: torch.Tensor) -> VisualPages:
        """The pages in a layer."""
        return VisualPages(kv_cache.view(torch.uint8).flatten(2)[self.pages], self.used)


class WatchedLayer:
    """Stands in for the methods of one attention layer's implementation, and looks at its steps."""

    def __init__(self, layer: Any) -> None:
        impl = self.impl = layer.impl
        self.slot_mapping = torch.empty(0, dtype=torch.int64)
        self.original_update, self.original_forward = impl.do_kv_cache_update, impl.forward
        impl.do_kv_cache_update, impl.forward = self.update, self.forward

    def update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Note where the tokens go."""
        self.slot_mapping = slot_mapping
        self.original_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of a step, and then :meth:`watch`, except in a dummy step."""
        result = self.original_forward(
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        if attn_metadata is not None:
            self.watch(query, key, value, kv_cache, output)
        return result

    def watch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Look at a step after its attention; ``output`` may be changed."""
        raise NotImplementedError

    def read_codes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pages: VisualPages
    ) -> torch.Tensor:
        """Attention of a step's last tokens, had they found all its visual tokens in pages.

        ``query`` is ``[T, Hq, D]``, as the result is in float32; ``key`` and ``value`` are those of
        the step's text tokens, ``[n, Hkv, D]``.
        """
        codec: Codec = self.impl.codec
        return mixed_attention(
            query,
            key,
            value,
            pages,
            page_format=codec.page_format,
            scale=self.impl.scale,
            calibration=self.impl.calibration,
            basis=codec.basis,
        )


class ProbedLayer(WatchedLayer):
    """Collects moments, or reads the step's own codes, as its mode asks.

    ``places`` is shared by all layers and emptied after every step.
    """

    def __init__(self, layer: Any, output_metric: torch.Tensor, places: dict[int, Places]) -> None:
        super().__init__(layer)
        self.output_metric, self.places = output_metric, places
        self.mode: Mode = "exact"
        self.moments: Moments | None = None

    def watch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """What the mode asks for."""
        if self.mode == "exact":
            return
        table = self.slot_mapping.data_ptr()
        if table not in self.places:
            self.places[table] = Places.of(self.slot_mapping, self.impl.codec.page_format.tokens)
        at = self.places[table]
        if not at.behind:
            return
        n = at.tokens
        query, key, value = query[at.behind : n], key[:n], value[:n]
        if self.mode == "moments":
            if self.moments is None:
                self.moments = Moments.zeros(key.shape[1], key.shape[2], key.device)
            self.moments.add(
                query, key, value, at.visual, at.page, self.output_metric, self.impl.scale
            )
            return
        attended = self.read_codes(query, key[at.text], value[at.text], at.read(kv_cache))
        output.view(-1, *attended.shape[1:])[at.behind : n] = attended.to(output.dtype)


@dataclass
class _Watched:
    layers: dict[int, ProbedLayer] = field(default_factory=dict)
    places: dict[int, Places] = field(default_factory=dict)
    """Of the step, by the address of the slot mapping."""
    wanted: deque[int] = field(default_factory=deque)
    """First positions whose hidden states are to be kept, of the prompts to come."""
    hidden: list[torch.Tensor] = field(default_factory=list)
    """Those of the prompts that were computed."""
    logits: Callable[[torch.Tensor], torch.Tensor] | None = None


class Probe:
    """vLLM's ``LLM`` with watched layers; see the module's docstring.

    Parameters
    ----------
    model
        Name or directory.
    start
        A profile of this model, which fixes the sub-slots of pages for good.
    max_tokens
        Of an answer.
    settings
        Further arguments of ``LLM``.
    """

    def __init__(self, model: str, start: Path, max_tokens: int, settings: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its objects are to be reached
        from vllm import LLM

        self.max_tokens = max_tokens
        self.llm = LLM(
            model,
            kv_cache_dtype="calibquant1",
            additional_config={SECTION: {"profile": str(start)}},
            enforce_eager=True,
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            **settings,
        )
        self.managers = compat.scheduler_of(self.llm).mixed_page_managers
        self.watched = _Watched()
        self.llm.apply_model(self._watch)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.managers, self.watched
        cleanup_dist_env_and_memory()
        gc.collect()

    def _watch(self, model: torch.nn.Module) -> None:
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models.utils import extract_layer_index

        from vllm_calibquant.attention.common import MixedLayer

        modules = dict(model.named_modules())
        for name, module in modules.items():
            if isinstance(module, Attention) and isinstance(module.impl, MixedLayer):
                metric = output_metric(modules[name.rpartition(".")[0]], module)
                index = extract_layer_index(module.layer_name)
                self.watched.layers[index] = ProbedLayer(module, metric, self.watched.places)

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.watched.places.clear()
            if self.watched.wanted:
                hidden = output[0] if isinstance(output, tuple) else output
                self.watched.hidden.append(hidden[self.watched.wanted.popleft() :].clone())

        model.register_forward_hook(keep)
        self.watched.logits = model.compute_logits  # type: ignore[assignment]

    @contextmanager
    def _mode(self, mode: Mode, exact: Container[int] = ()) -> Iterator[None]:
        for index, layer in self.watched.layers.items():
            layer.mode = "exact" if index in exact else mode
        try:
            yield
        finally:
            for layer in self.watched.layers.values():
                layer.mode = "exact"

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Greedy answers at 16 bits: for the time being, no modality goes into codes."""
        specs = [manager.kv_cache_spec for manager in self.managers]
        for manager, spec in zip(self.managers, specs, strict=True):
            manager.kv_cache_spec = replace(spec, modalities=())
        try:
            outputs = self._chat([_messages(p) for p in prompts], self.max_tokens)
        finally:
            for manager, spec in zip(self.managers, specs, strict=True):
                manager.kv_cache_spec = spec
        return [Answer(o.outputs[0].text, len(o.prompt_token_ids)) for o in outputs]

    def references(self, asked: Sequence[tuple[Prompt, Answer]]) -> Iterator[Reference]:
        """The 16-bit model's distributions along answers; takes in the prompts' moments."""
        with self._mode("moments"):
            for _, hidden in self._run(asked):
                logprobs = self._logprobs(hidden)
                best = logprobs.topk(min(CANDIDATES, logprobs.shape[1]))
                yield Reference(best.indices, best.values)

    def moments(self) -> dict[int, Moments]:
        """Moments of every layer over the references since this was last called.

        Raises
        ------
        ConfigError
            If there is nothing to learn from.
        """
        found = {i: layer.moments for i, layer in sorted(self.watched.layers.items())}
        for layer in self.watched.layers.values():
            layer.moments = None
        if not all(m is not None and m.weights[2].all() for m in found.values()):
            raise ConfigError(
                "the prompts of --data fill no visual page, which takes 32 visual tokens in a row; "
                "give larger images"
            )
        return {i: m.cpu() for i, m in found.items() if m is not None}

    def score(
        self,
        profile: Profile,
        asked: Sequence[tuple[Prompt, Answer]],
        references: Sequence[Reference],
    ) -> Score:
        """Compare the answers' distributions under a profile with those at 16 bits.

        Layers that the profile leaves at 16 bits are left so.
        """
        self.use(profile)
        divergences, same = [], []
        with self._mode("codes", profile.layers_16bit):
            for (_, hidden), reference in zip(self._run(asked), references, strict=True):
                logprobs = self._logprobs(hidden)
                divergences.append(divergence(reference, logprobs))
                same.append(logprobs.argmax(-1) == reference.tokens[:, 0])
        return Score(
            torch.cat(divergences).mean().item(),
            torch.cat(same).double().mean().item(),
            torch.stack([equal.all() for equal in same]).double().mean().item(),
        )

    def use(self, profile: Profile) -> None:
        """Let the layers of a profile store and read with its codecs from now on."""
        for index in profile.layers:
            impl = self.watched.layers[index].impl
            impl.use_codec(
                Codec.of_profile(
                    profile,
                    index,
                    slice(0, impl.num_kv_heads),
                    impl.model_dtype,
                    impl.codec.basis.key.mean.device,
                )
            )
            impl.calibration = Calibration(*profile.calibration) if profile.calibration else None

    def _chat(self, chats: list[Any], max_tokens: int, **kwargs: Any) -> list[Any]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        return self.llm.chat(chats, params, use_tqdm=False, **kwargs)

    def _run(
        self, asked: Sequence[tuple[Prompt, Answer]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Compute prompts with their answers.

        Yields the tokens of each, and the hidden states from which its answer's tokens are
        predicted and that which follows them.
        """
        for i in range(0, len(asked), BATCH):
            # A template ends in another way where the answer is empty.
            for spoke, some in groupby(asked[i : i + BATCH], lambda a: bool(a[1].text.strip())):
                yield from self._run_alike(list(some), spoke)

    def _run_alike(
        self, asked: Sequence[tuple[Prompt, Answer]], spoke: bool
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        chats, kwargs = [_messages(prompt) for prompt, _ in asked], {}
        if spoke:
            for messages, (_, answer) in zip(chats, asked, strict=True):
                messages.append({"role": "assistant", "content": answer.text})
            kwargs = {"add_generation_prompt": False, "continue_final_message": True}
        firsts = [answer.prompt_tokens - 1 for _, answer in asked]
        watched, scheduler = self.watched, compat.scheduler_of(self.llm)
        watched.hidden.clear()
        watched.wanted.extend(firsts)
        # One prompt a step, in this order; their images are prepared together.
        most, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 1
        try:
            outputs = self._chat(chats, 1, **kwargs)
        finally:
            scheduler.max_num_active_reqs = most
            watched.wanted.clear()
        hidden = [*watched.hidden]
        for output, first, kept in zip(outputs, firsts, hidden, strict=True):
            ids = output.prompt_token_ids
            yield ids, kept[: len(ids) - first]

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.watched.logits is not None
        with torch.inference_mode():
            return self.watched.logits(hidden).float().log_softmax(-1)


def _messages(prompt: Prompt) -> list[dict[str, Any]]:
    images = [{"type": "image_pil", "image_pil": image} for image in prompt.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt.question}]}]


def divergence(reference: Reference, logprobs: torch.Tensor) -> torch.Tensor:
    """KL divergence from 16 bits at each position, in nats; a lower bound.

    Tokens that are not among the reference's candidates count as one, which by the data-processing
    inequality never makes the divergence larger.

    Parameters
    ----------
    reference
        At 16 bits.
    logprobs
        float32 ``[T, vocabulary]``, of the same positions.
    """
    p, q = reference.logprobs.double(), logprobs.gather(-1, reference.tokens).double()
    rest_p = (1 - p.exp().sum(-1)).clamp(min=1e-9)
    rest_q = (1 - q.exp().sum(-1)).clamp(min=1e-9)
    known = (p.exp() * (p - q)).sum(-1)
    return (known + rest_p * (rest_p / rest_q).log()).clamp(min=0.0)


def output_metric(parent: torch.nn.Module, attention: Any) -> torch.Tensor:
    """How much the model's stream moves with each query head's output: float32 ``[Hq, D, D]``.

    That is W' W for the linear layer W behind attention.  It is found by name and read by sending
    unit vectors through, so that the layer may be quantised or packed.  Where there is no such
    layer, values count alike in all directions.
    """
    heads, d = attention.num_heads, attention.head_size_v
    device = next((p.device for p in parent.parameters()), torch.device("cpu"))
    unit = torch.eye(heads * d, dtype=attention.impl.model_dtype, device=device)
    for name in OUTPUT_NAMES:
        layer = getattr(parent, name, None)
        if layer is None:
            continue
        with torch.inference_mode():
            found = [layer(x) for x in (unit, torch.zeros_like(unit[:1]))]
        rows, bias = (x[0] if isinstance(x, tuple) else x for x in found)
        weight = (rows - bias).unflatten(0, (heads, d)).float()  # [Hq, D, C]
        return weight @ weight.mT
    return torch.eye(d, device=device).expand(heads, d, d)
