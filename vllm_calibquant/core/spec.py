"""The KV cache spec of a layer with mixed pages."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_calibquant.config import CalibQuantConfig
from vllm_calibquant.format import PageFormat
from vllm_calibquant.profile import load_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class MixedPageSpec(FullAttentionSpec):
    """Full attention whose pages hold text at the model's precision or visual tokens in codes.

    A class of its own, and its own base for grouping, so that a layer of another dtype never joins
    the group and sees tagged ids.
    """

    slots: int
    """Sub-slots of a visual page."""

    modalities: tuple[str, ...]
    """Modalities whose embedded tokens are visual."""

    @classmethod
    def of(cls, spec: AttentionSpec, config: CalibQuantConfig) -> MixedPageSpec:
        """The mixed twin of a plain spec: the same page, with another reading of its bytes."""
        if config.profile:
            slots = load_profile(config.profile).slots(spec.dtype)
        else:
            slots = PageFormat.uniform(spec.head_size, config.bits, spec.dtype).slots
        kwargs = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        # vLLM would merge us, as a subclass, into the group of a plain layer that comes first.  It
        # keeps layers apart that differ in this field, which means nothing without context
        # parallelism, and that is refused.
        kwargs["dcp_sharded"] = False
        return cls(**kwargs, slots=slots, modalities=config.modalities)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """The least that a request of ``max_model_len`` tokens takes: all of them visual.

        vLLM refuses to start with a smaller pool.  Longer texts than the pool holds are refused
        one by one, see :mod:`vllm_calibquant.admission`.
        """
        blocks = -(-vllm_config.model_config.max_model_len // self.block_size)
        return -(-blocks // self.slots) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Specs of one group are equal: their pages are shared.

        An AssertionError is how vLLM learns that layers need groups of their own.
        """
        first = specs[0]
        assert all(spec == first for spec in specs), "layers of one KV cache group differ"
        return first
