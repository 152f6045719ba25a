"""Requests, page contents and invariants that the tests of the block manager share.

Nothing here imports the code under test except to build it: ids are decoded, spans are found and
layouts are decided by loops of their own, written from ``design.md``.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_calibquant import plugin
from vllm_calibquant.config import CalibQuantConfig
from vllm_calibquant.core.manager import MixedPageManager
from vllm_calibquant.core.spec import MixedPageSpec

BLOCK = 16
VISUAL_MODALITIES = ("image", "video")
IMAGE_TOKEN = 32000
FIRST_TAG = 2**23

# A refused reset of the prefix cache is logged each time.
logging.getLogger("vllm.v1.core.block_pool").setLevel(logging.ERROR)

plugin.register()
init_none_hash(sha256)
BLOCK_HASHER = get_request_block_hasher(BLOCK, sha256)


def fuzz_settings(examples: int, steps: int) -> settings:
    """Settings of a state machine: the same runs in every CI job.

    ``CALIBQUANT_FUZZ=20`` runs 20 times as many examples, other ones each time.
    """
    factor = int(os.environ.get("CALIBQUANT_FUZZ", "0"))
    return settings(
        max_examples=examples * max(factor, 1),
        stateful_step_count=steps,
        derandomize=not factor,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


# Requests.


@dataclass(frozen=True)
class Text:
    """A run of text tokens."""

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, length: int, seed: int) -> Text:
        """Text that depends on a seed; of two lengths, the shorter is a prefix of the longer."""
        return cls(tuple((seed * 7919 + i * 31) % 997 for i in range(length)))


@dataclass(frozen=True)
class Media:
    """An image, video or audio clip in a prompt.

    Styles are those of real processors: ``bare`` (LLaVA), ``wrapped`` in a start and an end marker
    (InternVL), ``rows`` with a separator after every 24 tokens and one marker in front.
    """

    embeds: int
    seed: int
    style: str = "bare"
    modality: str = "image"

    @property
    def identifier(self) -> str:
        """Content hash: equal media have the same."""
        return f"{self.modality}-{self.style}-{self.embeds}-{self.seed}"

    @property
    def mask(self) -> list[bool]:
        """Which positions of the placeholder get an embedding."""
        if self.style == "wrapped":
            return [False] + [True] * self.embeds + [False]
        if self.style == "rows":
            mask = [False]
            for i in range(self.embeds):
                mask.append(True)
                if i % 24 == 23:
                    mask.append(False)
            return mask
        return [True] * self.embeds


Segment = Text | Media


def make_request(
    request_id: str, segments: Sequence[Segment], max_tokens: int = 8, **kwargs: Any
) -> Request:
    """A real request with these parts, one after the other."""
    tokens: list[int] = []
    features = []
    for segment in segments:
        if isinstance(segment, Text):
            tokens.extend(segment.tokens)
            continue
        mask = segment.mask
        position = PlaceholderRange(
            offset=len(tokens),
            length=len(mask),
            is_embed=None if all(mask) else torch.tensor(mask),
        )
        features.append(
            MultiModalFeatureSpec(
                data=None,
                modality=segment.modality,
                identifier=segment.identifier,
                mm_position=position,
                mm_hash=segment.identifier,
            )
        )
        tokens.extend([IMAGE_TOKEN] * len(mask))
    return Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
        pooling_params=None,
        mm_features=features,
        block_hasher=BLOCK_HASHER,
        **kwargs,
    )


class Tape:
    """What the K and V of each position of a request depend on, condensed to one number.

    Number t depends on tokens and embeddings up to t, so equal numbers mean equal contents.  The
    language model is deterministic too: position t's token is a function of number t - 1, which
    makes contents of positions known before vLLM knows their tokens.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._start()

    def _start(self) -> None:
        self.prompt_tokens = self.request.num_prompt_tokens
        self.embedded: dict[int, tuple[str, int]] = {}
        self.visual: set[int] = set()
        for feature in self.request.mm_features:
            where = feature.mm_position
            mask = [True] * where.length if where.is_embed is None else where.is_embed.tolist()
            for i, is_embed in enumerate(mask):
                if is_embed:
                    self.embedded[where.offset + i] = (feature.identifier, i)
                    if feature.modality in VISUAL_MODALITIES:
                        self.visual.add(where.offset + i)
        self.chain: list[int] = []
        self.hashes_noted = 0

    def upto(self, end: int) -> list[int]:
        """Numbers of at least the positions before ``end``."""
        if self.request.num_prompt_tokens != self.prompt_tokens:
            self._start()  # a streaming session got its next input
        tokens = self.request.all_token_ids
        for t in range(len(self.chain), end):
            before = self.chain[-1] if t else 0
            token = tokens[t] if t < len(tokens) else before % 1000
            self.chain.append(hash((before, token, self.embedded.get(t))))
        return self.chain

    def next_token(self) -> int:
        """The token that the model samples after all tokens so far."""
        n = self.request.num_tokens
        return self.upto(n)[n - 1] % 1000


def expected_pages(
    tape: Tape, start: int, end: int, held_blocks: int, slots: int
) -> list[list[int]]:
    """Rules (a) and (b) of design.md for one step, block by block.

    Returns the blocks of each visual page in order; all other blocks of the step are text.
    """
    tape.upto(0)
    blocks = []
    for block in range(start // BLOCK, -(-end // BLOCK)):
        positions = range(block * BLOCK, (block + 1) * BLOCK)
        inside = all(start <= t < end for t in positions)
        if block >= held_blocks and inside and all(t in tape.visual for t in positions):
            blocks.append(block)
    pages = [blocks[i : i + slots] for i in range(0, len(blocks), slots)]
    return [page for page in pages if len(page) >= 2]


# Pages.


class Contents:
    """What every page of the pool holds, as the worker that executes the steps leaves it.

    A text page is a list of tape numbers, one for each written slot; a visual page is a dict from
    sub-slot to the tuple of its 16 numbers.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.pages: dict[int, list[int] | dict[int, tuple[int, ...]]] = {}
        self.visual_pages_written = 0

    def write(
        self,
        tape: Tape,
        table: Sequence[int],
        start: int,
        end: int,
        held_blocks: int,
        held_by_others: Container[int],
    ) -> None:
        """Execute one step of a request, and check the format of every block that it touches.

        Parameters
        ----------
        table
            Block ids of the request.
        start, end
            Positions that the step computes.
        held_blocks
            Blocks that the request had before the step, prefix hits included.
        held_by_others
            Pages that other requests referred to before the step.  (A prefix hit may be on blocks
            of the same step: K and V of all requests are written before any is read.)
        """
        chain = tape.upto(end)
        planned = expected_pages(tape, start, end, held_blocks, self.slots)
        own = {i % FIRST_TAG for i in table[:held_blocks]}
        where = {block: (i, s) for i, page in enumerate(planned) for s, block in enumerate(page)}
        page_of_group: dict[int, int] = {}
        for block in range(start // BLOCK, -(-end // BLOCK)):
            page, slot = table[block] % FIRST_TAG, table[block] // FIRST_TAG - 1
            first, last = max(start, block * BLOCK), min(end, (block + 1) * BLOCK)
            new = tuple(chain[first:last])
            assert (slot >= 0) == (block in where), (
                f"block {block} of step {start}..{end} has format {slot}"
            )
            if slot >= 0:
                group, expected_slot = where[block]
                assert slot == expected_slot
                if group not in page_of_group:
                    assert page not in page_of_group.values(), "two groups share a page"
                    page_of_group[group] = page
                    assert page not in held_by_others, "a page was taken while others read it"
                    assert page not in own
                    self.pages[page] = {}
                    self.visual_pages_written += 1
                assert page == page_of_group[group]
                content = self.pages[page]
                assert isinstance(content, dict)
                assert slot not in content
                content[slot] = new
            else:
                if first == block * BLOCK:
                    assert page not in held_by_others, "a page was taken while others read it"
                    assert (page in own) == (block < held_blocks)
                    self.pages[page] = []
                content = self.pages[page]
                assert isinstance(content, list), "a text block continues in a visual page"
                offset = first - block * BLOCK
                if len(content) > offset:
                    # A streaming session replaces a sampled token that it had computed already.
                    assert tape.request.resumable, "a slot was written twice"
                    assert page not in held_by_others
                    del content[offset:]
                assert len(content) == offset, "a slot was skipped"
                content.extend(new)

    def check_reads(self, tape: Tape, table: Sequence[int], end: int) -> None:
        """Check that each block of a request holds the request's own content before ``end``."""
        chain = tape.upto(end)
        for block in range(-(-end // BLOCK)):
            last = min(end, (block + 1) * BLOCK)
            page, slot = table[block] % FIRST_TAG, table[block] // FIRST_TAG - 1
            content = self.pages[page]
            if slot >= 0:
                assert isinstance(content, dict)
                assert content[slot] == tuple(chain[last - BLOCK : last])
            else:
                assert isinstance(content, list)
                assert len(content) >= last - block * BLOCK
                assert content[last - block * BLOCK - 1] == chain[last - 1]


# Managers.


def plain_spec() -> FullAttentionSpec:
    """Spec of the same layers at 16 bits."""
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=128, dtype=torch.bfloat16)


def mixed_spec(bits: int) -> MixedPageSpec:
    """Spec of layers with mixed pages."""
    return MixedPageSpec.of(plain_spec(), CalibQuantConfig(bits=bits))


def cache_config(spec: FullAttentionSpec, num_blocks: int) -> KVCacheConfig:
    """A pool for one group of layers; the null block is one of ``num_blocks``."""
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )


def cache_manager(
    spec: FullAttentionSpec,
    num_blocks: int,
    *,
    enable_caching: bool = True,
) -> KVCacheManager:
    """VLLM's KV cache manager for one group of layers."""
    return KVCacheManager(
        kv_cache_config=cache_config(spec, num_blocks),
        max_model_len=65536,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=enable_caching,
        enable_kv_cache_events=enable_caching,
    )


class PromiseWatch:
    """Compares what a manager promises for a step with what the step takes from the free list.

    The two methods go on to the real ones.
    """

    def __init__(self, manager: MixedPageManager) -> None:
        self.steps = 0
        self._promises: dict[str, tuple[int, int]] = {}
        pool = manager.block_pool
        promise, take = manager.get_num_blocks_to_allocate, manager.allocate_new_blocks

        def get_num_blocks_to_allocate(request_id: str, *args: Any, **kwargs: Any) -> int:
            pages = promise(request_id, *args, **kwargs)
            if not kwargs.get("apply_admission_cap"):
                self._promises[request_id] = (pages, pool.get_num_free_blocks())
            return pages

        def allocate_new_blocks(request_id: str, *args: Any) -> list:
            blocks = take(request_id, *args)
            pages, free_before = self._promises.pop(request_id)
            taken = free_before - pool.get_num_free_blocks()
            assert taken == pages, f"promised {pages} pages, took {taken}"
            self.steps += 1
            return blocks

        manager.get_num_blocks_to_allocate = get_num_blocks_to_allocate  # type: ignore[method-assign]
        manager.allocate_new_blocks = allocate_new_blocks  # type: ignore[method-assign]


class HashBook:
    """Content that each block hash of vLLM stands for, noted from the requests themselves."""

    def __init__(self) -> None:
        self._content: dict[bytes, int] = {}

    def note(self, tape: Tape) -> None:
        """Note the hashes of a request's full blocks."""
        hashes = tape.request.block_hashes
        chain = tape.upto(len(hashes) * BLOCK)
        for i in range(tape.hashes_noted, len(hashes)):
            content = self._content.setdefault(bytes(hashes[i]), chain[(i + 1) * BLOCK - 1])
            assert content == chain[(i + 1) * BLOCK - 1], "one hash for two contents"
        tape.hashes_noted = len(hashes)

    def __getitem__(self, block_hash: bytes) -> int:
        return self._content[block_hash]


def check_pool(
    manager: MixedPageManager,
    tapes: Mapping[str, Tape],
    contents: Contents,
    hashes: HashBook,
) -> None:
    """Check every invariant of the pool that does not depend on what a step did."""
    pool = manager.block_pool
    blocks_of = {rid: blocks for rid, blocks in manager.req_to_blocks.items() if blocks}
    assert blocks_of.keys() <= tapes.keys(), "a request that ended holds blocks"
    for stale in (manager._spans, manager._layouts, manager.num_cached_block):
        assert stale.keys() <= tapes.keys(), "state of a request that ended is kept"

    # Ids are unique within a request and name pages and sub-slots that exist.
    holders: Counter[int] = Counter()
    visual_pages: set[int] = set()
    for blocks in blocks_of.values():
        ids = [block.block_id for block in blocks]
        assert len(set(ids)) == len(ids), "an id occurs twice"
        assert all(0 < i % FIRST_TAG < pool.num_gpu_blocks for i in ids)
        assert all(i // FIRST_TAG <= contents.slots for i in ids)
        text = [i for i in ids if i < FIRST_TAG]
        visual = {i % FIRST_TAG for i in ids if i >= FIRST_TAG}
        assert not visual.intersection(text), "a page is text and visual at once"
        holders.update(visual.union(text))
        visual_pages |= visual

    # Reference counts are the numbers of holders, and a page is free if it has none.
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert len(free) == pool.get_num_free_blocks()
    assert len(set(free)) == len(free)
    assert all(pool.blocks[i].ref_cnt == n for i, n in holders.items())
    assert set(free).isdisjoint(holders)
    assert len(free) + len(holders) == pool.num_gpu_blocks - 1, "pages leaked"
    assert all(pool.blocks[i].ref_cnt == 0 for i in free)

    # The ledger is a recount.
    assert manager.ledger.held_pages == len(visual_pages)
    assert manager.ledger.held_slots == sum(len(contents.pages[page]) for page in visual_pages)

    # Each entry of the hash map leads to exactly the content that its hash stands for, and each
    # page knows all its hashes, so that eviction finds them.
    known: dict[int, int] = Counter()
    for key, entries in pool.cached_block_hash_to_block._cache.items():
        number = hashes[bytes(key[:-4])]  # the last 4 bytes are the group
        for block_id, entry in entries.items() if isinstance(entries, dict) else [(None, entries)]:
            page = pool.blocks[entry.block_id]
            assert block_id in (None, page.block_id)
            more = pool.cached_block_hashes_by_block.get(page.block_id, ())
            assert key == page.block_hash or key in more
            known[page.block_id] += 1
            content = contents.pages[page.block_id]
            if isinstance(content, dict):
                assert content[entry.slot][-1] == number
            else:
                assert entry is page
                assert len(content) == BLOCK
                assert content[-1] == number
    for page in pool.blocks:
        more = pool.cached_block_hashes_by_block.get(page.block_id, ())
        assert known[page.block_id] == (page.block_hash is not None) + len(more)


def check_empty(manager: MixedPageManager, others: Iterable[Any] = ()) -> None:
    """Check that nothing is left of any request."""
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
    assert manager.ledger.held_pages == 0
    assert manager.ledger.held_slots == 0
    for state in (manager.req_to_blocks, manager._spans, manager._layouts, *others):
        assert not state
