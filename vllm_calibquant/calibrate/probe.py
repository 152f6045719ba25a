"""A real vLLM in this process whose attention layers are watched and whose codecs can be changed.

Prompts are computed one at a time, each in one step: what a layer sees of a step is one prompt, all
of its keys and values at full precision, and its slot mapping says which tokens went to which
visual page.  Three things are done with that:

* the layers as they are, with no modality in codes: answers at 16 bits;
* :class:`~vllm_calibquant.calibrate.moments.Moments` of every layer;
* attention as after a prefix hit: all tokens behind the last visual page read the pages, which the
  step itself has just written with the codec under test.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from vllm_calibquant import compat
from vllm_calibquant.attention.reference import Calibration, VisualPages, mixed_attention
from vllm_calibquant.attention.store import Codec
from vllm_calibquant.calibrate.moments import Moments
from vllm_calibquant.calibrate.prompts import Prompt
from vllm_calibquant.config import SECTION, ConfigError
from vllm_calibquant.format import GROUP
from vllm_calibquant.tags import is_visual, page_of, slot_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_calibquant.profile import Profile

BLOCK_SIZE = 2 * GROUP
CANDIDATES = 1024
"""Most likely tokens of the 16-bit model that a divergence tells apart."""
OUTPUT_NAMES = ("o_proj", "out_proj", "wo", "dense", "proj", "c_proj")
"""What models call the linear layer behind attention."""

Mode = Literal["exact", "moments", "codes"]


@dataclass
class Reference:
    """The 16-bit model's view of the tokens that are scored in one prompt."""

    first: int
    """Position whose distribution is the first that counts."""
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

    def pages_of(
        self, slots: torch.Tensor, kv_cache: torch.Tensor
    ) -> tuple[VisualPages, torch.Tensor, torch.Tensor]:
        """The pages that visual slots lie in, and page and place there of each."""
        blocks = slots // BLOCK_SIZE
        pages, index = torch.unique(page_of(blocks), return_inverse=True)
        token = slot_of(blocks) * BLOCK_SIZE + slots % BLOCK_SIZE
        used = torch.zeros(len(pages), self.impl.codec.page_format.tokens, dtype=torch.bool)
        used = used.to(slots.device)
        used[index, token] = True
        return VisualPages(kv_cache.view(torch.uint8).flatten(2)[pages], used), index, token

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
    """Collects moments, or reads the step's own codes, as its mode asks."""

    def __init__(self, layer: Any, output_weight: torch.Tensor | None) -> None:
        super().__init__(layer)
        self.output_weight = output_weight
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
        slots = self.slot_mapping[self.slot_mapping >= 0]  # padding comes last
        n, blocks = len(slots), slots // BLOCK_SIZE
        coded = is_visual(blocks)
        if not coded.any():
            return
        behind = int(coded.nonzero().max()) + 1
        query, key, value = query[behind:n], key[:n], value[:n]
        if self.mode == "moments":
            pages = torch.where(coded, page_of(blocks), -1)
            if self.moments is None:
                self.moments = Moments.zeros(key.shape[1], key.shape[2], key.device)
            self.moments.add(query, key, value, pages, self.output_weight, self.impl.scale)
            return
        visual, _, _ = self.pages_of(slots[coded], kv_cache)
        attended = self.read_codes(query, key[~coded], value[~coded], visual)
        output.view(-1, *attended.shape[1:])[behind:n] = attended.to(output.dtype)


@dataclass
class _Watched:
    layers: dict[int, ProbedLayer] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
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
                weight = output_weight(modules[name.rpartition(".")[0]], module)
                index = extract_layer_index(module.layer_name)
                self.watched.layers[index] = ProbedLayer(module, weight)

        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.watched.hidden = output[0] if isinstance(output, tuple) else output

        model.register_forward_hook(keep)
        self.watched.logits = model.compute_logits  # type: ignore[assignment]

    @contextmanager
    def _mode(self, mode: Mode) -> Iterator[None]:
        for layer in self.watched.layers.values():
            layer.mode = mode
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

    def reference(self, prompt: Prompt, answer: Answer) -> Reference:
        """The 16-bit model's distributions along an answer; takes in the prompt's moments."""
        with self._mode("moments"):
            hidden = self._run(prompt, answer.text)[1]
        first = answer.prompt_tokens - 1
        logprobs = self._logprobs(hidden[first:])
        best = logprobs.topk(min(CANDIDATES, logprobs.shape[1]))
        return Reference(first, best.indices, best.values)

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
        """Compare the answers' distributions under a profile with those at 16 bits."""
        self.use(profile)
        divergences, same, whole = [], [], []
        with self._mode("codes"):
            for (prompt, answer), reference in zip(asked, references, strict=True):
                hidden = self._run(prompt, answer.text)[1]
                logprobs = self._logprobs(hidden[reference.first :])
                divergences.append(divergence(reference, logprobs))
                equal = logprobs.argmax(-1) == reference.tokens[:, 0]
                same.append(equal)
                whole.append(bool(equal.all()))
        return Score(
            torch.cat(divergences).mean().item(),
            torch.cat(same).double().mean().item(),
            sum(whole) / len(whole),
        )

    def use(self, profile: Profile) -> None:
        """Let all layers store and read with a profile's codecs from now on."""
        for index, layer in self.watched.layers.items():
            impl = layer.impl
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

    def _run(self, prompt: Prompt, answer: str) -> tuple[list[int], torch.Tensor]:
        """Compute a prompt with its answer; its tokens, and the last hidden state of each."""
        messages = _messages(prompt)
        kwargs: dict[str, Any] = {}
        if answer.strip():
            messages.append({"role": "assistant", "content": answer})
            kwargs = {"add_generation_prompt": False, "continue_final_message": True}
        ids = self._chat([messages], 1, **kwargs)[0].prompt_token_ids
        assert self.watched.hidden is not None
        return ids, self.watched.hidden[: len(ids)]

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


def output_weight(parent: torch.nn.Module, attention: Any) -> torch.Tensor | None:
    """What the linear layer behind attention makes of each query head: ``[Hq, C, D]``.

    Found by name and read by sending unit vectors through, so that the layer may be quantised or
    packed.  None where there is no such layer; values then count alike in all directions.
    """
    heads, d = attention.num_heads, attention.head_size_v
    for name in OUTPUT_NAMES:
        layer = getattr(parent, name, None)
        if layer is None:
            continue
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        unit = torch.eye(heads * d, dtype=attention.impl.model_dtype, device=device)
        with torch.inference_mode():
            found = [layer(x) for x in (unit, torch.zeros_like(unit[:1]))]
        rows, bias = (x[0] if isinstance(x, tuple) else x for x in found)
        return (rows - bias).unflatten(0, (heads, d)).mT.contiguous()
    return None
