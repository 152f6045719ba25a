"""The block manager under random requests, beside stock vLLM where both must agree.

A state machine drives a real ``KVCacheManager`` the way a scheduler does: look up the prefix cache,
allocate a chunk, sample, preempt, abort, finish, reset.  After every step all invariants of
``design.md`` are checked, among them that each block a request refers to holds that request's own
tokens, in a model of what the worker writes.  In the modes ``text`` and ``ample`` a second manager,
vLLM's own, gets the same calls.
"""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from vllm.v1.request import RequestStatus

from tests.core.harness import (
    BLOCK,
    FIRST_TAG,
    Contents,
    HashBook,
    Media,
    PromiseWatch,
    Segment,
    Tape,
    Text,
    cache_manager,
    check_empty,
    check_pool,
    expected_pages,
    fuzz_settings,
    make_request,
    mixed_spec,
    plain_spec,
)
from vllm_calibquant.core.layout import clip_chunk
from vllm_calibquant.core.spans import visual_spans

SLOTS = {1: 14, 2: 7, 4: 3}
AMPLE_PAGES = 3_000
"""Twice what an example may touch, so that nothing is evicted."""

lengths = st.one_of(st.integers(1, 40), st.integers(1, 400), st.integers(1, 2000))
texts = st.builds(Text.of, st.one_of(st.integers(1, 20), st.integers(1, 200)), st.integers(0, 3))
media = st.builds(
    Media,
    lengths,
    st.integers(0, 2),
    st.sampled_from(["bare", "bare", "wrapped", "rows"]),
    st.sampled_from(["image", "image", "image", "video", "audio"]),
)
prompts = st.lists(st.one_of(texts, media, media), min_size=1, max_size=5)
chunks = st.one_of(
    st.just(1 << 20),
    st.integers(1, 40),
    st.sampled_from([100, 256, 512, 2048]),
    st.integers(1, 700),
)


def free_list(pool: BlockPool) -> list[int]:
    """Free pages in the order in which they will be taken."""
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


class BlockManagerMachine(RuleBasedStateMachine):
    """Random calls to a block manager and, in two modes, to its stock twin."""

    steps = 0
    """Chunks computed over all examples."""
    seen: set[str] = set()  # noqa: RUF012
    """What happened at least once, so that the test can say that it was not idle."""

    @initialize(
        mode=st.sampled_from(["tight", "tight", "ample", "text", "uncached"]),
        bits=st.sampled_from([1, 1, 2, 4]),
        tight_pages=st.integers(20, 150),
    )
    def start(self, mode: str, bits: int, tight_pages: int) -> None:
        """Make managers; in the mode ``ample`` nothing is ever evicted."""
        self.mode = mode
        self.slots = SLOTS[bits]
        pages = AMPLE_PAGES if mode == "ample" else tight_pages
        options = {"enable_caching": mode != "uncached"}
        self.kv = cache_manager(mixed_spec(bits), pages, **options)
        self.twin = None
        if mode in ("text", "ample"):  # 16-bit pages take more of a pool that must not evict
            self.twin = cache_manager(plain_spec(), 10 * pages if mode == "ample" else pages)
        (self.manager,) = self.kv.coordinator.single_type_managers
        assert self.manager.kv_cache_spec.slots == self.slots
        self.watch = PromiseWatch(self.manager)
        self.contents = Contents(self.slots)
        self.hashes = HashBook()
        self.tapes: dict[str, Tape] = {}
        self.published: Counter[int | bytes] = Counter()
        self.manager.requests = {}
        self.past: list[list[Segment]] = [[Text.of(30, 0)]]
        self.count = 0

    # What happens to requests.

    @precondition(lambda self: len(self.tapes) < 6 and len(self.contents.pages) < AMPLE_PAGES // 2)
    @rule(
        new=prompts,
        base=st.integers(0, 99),
        keep=st.integers(0, 6),
        skip_cache=st.sampled_from([False] * 7 + [True]),
    )
    def add(self, new: list[Segment], base: int, keep: int, skip_cache: bool) -> None:
        """A request that shares its first parts with an earlier one, or none."""
        segments = self.past[base % len(self.past)][:keep] + new
        if self.mode == "text":
            segments = [s if isinstance(s, Text) else Text.of(s.embeds, 9) for s in segments]
        self.past.append(segments)
        request = make_request(f"r{self.count}", segments)
        request.skip_reading_prefix_cache = skip_cache
        self.count += 1
        self.tapes[request.request_id] = Tape(request)
        self.manager.requests[request.request_id] = request
        self.check()

    @precondition(lambda self: self.tapes)
    @rule(
        order=st.lists(st.integers(0, 99), min_size=3, max_size=25),
        chunk=chunks,
        clip=st.booleans(),
        lookahead=st.sampled_from([0, 0, 0, 0, 1, 5, 40]),
        whole=st.booleans(),
    )
    def run(self, order: list[int], **options) -> None:
        """Compute chunks of several requests in turn."""
        for index in order:
            self.step(index, **options)

    def step(self, index: int, chunk: int, clip: bool, lookahead: int, whole: bool) -> None:
        """Compute a chunk of a request, which may be new, running, or preempted before."""
        request = self.pick(index)
        running = request.status == RequestStatus.RUNNING
        if running and request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(self.tapes[request.request_id].next_token())
            self.seen.add("decode")
        hit, blocks = 0, None
        if not running:
            blocks, hit, _ = self.kv.get_computed_blocks(request)
            self.check_hit(request, blocks, hit)
        start = request.num_computed_tokens + hit
        tokens = min(chunk, request.num_tokens - start)
        if clip:
            spans = visual_spans(request.mm_features, ("image", "video"))
            tokens = clip_chunk(spans, start, tokens, block_size=BLOCK, slots=self.slots)
        held = len(self.manager.req_to_blocks.get(request.request_id, ())) + hit // BLOCK

        arguments = {
            "num_new_computed_tokens": hit,
            "new_computed_blocks": blocks,
            "num_lookahead_tokens": lookahead,
            "full_sequence_must_fit": whole and not running,
        }
        if self.twin and not running:
            stock, stock_hit, _ = self.twin.get_computed_blocks(request)
            assert stock_hit == hit, "the prefix hit differs from stock vLLM's"
        free = self.kv.block_pool.get_num_free_blocks()
        new = self.kv.allocate_slots(request, tokens, **arguments)
        if self.twin:
            if not running:
                arguments["new_computed_blocks"] = stock
            stock_new = self.twin.allocate_slots(request, tokens, **arguments)
            assert (stock_new is None) == (new is None)
        if new is None:
            # Nothing may have changed; the scheduler would preempt someone.
            assert self.kv.block_pool.get_num_free_blocks() == free
            self.seen.add("out of pages")
            self.check()
            return

        end = start + tokens
        (ids,) = self.kv.get_block_ids(request.request_id)
        assert len(ids) == -(-(end + lookahead) // BLOCK) or len(ids) == held
        assert new.get_block_ids()[0] == ids[held:]
        if self.mode == "text":
            assert ids == self.twin.get_block_ids(request.request_id)[0]
        if not request.mm_features:
            assert all(i < FIRST_TAG for i in ids)
        request.status = RequestStatus.RUNNING
        tape = self.tapes[request.request_id]
        self.count_layout(tape, start, end, held, ids)
        others = {
            block.block_id % FIRST_TAG
            for request_id, blocks in self.manager.req_to_blocks.items()
            if request_id != request.request_id
            for block in blocks
        }
        self.contents.write(tape, ids, start, end, held, others)
        request.num_computed_tokens = end
        type(self).steps += 1
        self.check()

    @precondition(lambda self: self.tapes)
    @rule(index=st.integers(0, 99))
    def preempt(self, index: int) -> None:
        """Take all pages of a running request; it starts again later."""
        request = self.pick(index)
        if request.status == RequestStatus.RUNNING:
            self.free(request)
            request.status = RequestStatus.PREEMPTED
            request.num_computed_tokens = 0
            self.seen.add("preempted")
        self.check()

    @precondition(lambda self: len(self.tapes) > 2)
    @rule(index=st.integers(0, 99))
    def end(self, index: int) -> None:
        """Finish or abort a request, running or not; its answer may become part of a chat."""
        request = self.pick(index)
        segments = self.past[int(request.request_id[1:]) + 1]
        if request.output_token_ids:
            self.past.append([*segments, Text(tuple(request.output_token_ids))])
            # Requests are found in `past` by their number.
            self.past[int(request.request_id[1:]) + 1] = self.past.pop()
        self.free(request)
        del self.tapes[request.request_id]
        del self.manager.requests[request.request_id]
        self.check()

    @rule()
    def reset(self) -> None:
        """Reset the prefix cache, which works if and only if nobody holds a page."""
        idle = not any(self.manager.req_to_blocks.values())
        assert self.kv.reset_prefix_cache() == idle
        if self.twin:
            assert self.twin.reset_prefix_cache() == idle
        if idle:
            assert len(self.kv.block_pool.cached_block_hash_to_block) == 0
            assert not self.kv.block_pool.cached_block_hashes_by_block
        self.check()

    # Helpers.

    def pick(self, index: int):
        return list(self.tapes.values())[index % len(self.tapes)].request

    def free(self, request) -> None:
        self.kv.free(request)
        if self.twin:
            self.twin.free(request)

    def check_hit(self, request, blocks, hit: int) -> None:
        """A hit is at block granularity, in order, and holds the request's own content."""
        (ids,) = blocks.get_block_ids()
        assert hit == len(ids) * BLOCK < request.num_tokens
        self.contents.check_reads(self.tapes[request.request_id], ids, hit)
        if hit:
            self.seen.add("hit")
        pages = [i % FIRST_TAG for i in ids if i >= FIRST_TAG]
        if pages:
            self.seen.add("visual hit")
            filled = sum(len(self.contents.pages[page]) for page in set(pages))
            if filled != len(pages):
                self.seen.add("hit of a part of a page")

    def count_layout(self, tape: Tape, start: int, end: int, held: int, ids: list[int]) -> None:
        """Pages of a step, counted from its ids, against rules (a) and (b)."""
        visual = {i % FIRST_TAG for i in ids[held:] if i >= FIRST_TAG}
        planned = expected_pages(tape, start, end, held, self.slots)
        assert len(visual) == len(planned)
        assert all(len(page) >= 2 for page in planned)
        if any(len(page) < self.slots for page in planned):
            self.seen.add("page closed early")
        if planned:
            self.seen.add("visual page")

    def check(self) -> None:
        for tape in self.tapes.values():
            self.hashes.note(tape)
            request = tape.request
            ids = [b.block_id for b in self.manager.req_to_blocks.get(request.request_id, ())]
            assert bool(ids) == (request.num_computed_tokens > 0)
            self.contents.check_reads(tape, ids, request.num_computed_tokens)
        check_pool(self.manager, self.tapes, self.contents, self.hashes)
        self.check_events()
        if self.mode == "text":
            self.check_same_pool()

    def check_events(self) -> None:
        """Who follows vLLM's KV events knows what the prefix cache holds, visual blocks too."""
        for event in self.kv.take_events():
            if isinstance(event, BlockStored):
                self.published.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.published.subtract(event.block_hashes)
            else:
                self.published.clear()
        cached = Counter()
        for key, entries in self.kv.block_pool.cached_block_hash_to_block._cache.items():
            name = maybe_convert_block_hash(get_block_hash(key))
            cached[name] = len(entries) if isinstance(entries, dict) else 1
        assert +self.published == cached

    def check_same_pool(self) -> None:
        """Text alone leaves vLLM's own pool behind, down to the order of its free list."""
        ours, stock = self.kv.block_pool, self.twin.block_pool
        order = [
            [b.block_id for b in p.free_block_queue.get_all_free_blocks()] for p in (ours, stock)
        ]
        assert order[0] == order[1]
        assert [b.block_hash for b in ours.blocks] == [b.block_hash for b in stock.blocks]

    def teardown(self) -> None:
        """After all requests end, every page is free."""
        for tape in getattr(self, "tapes", {}).values():
            self.free(tape.request)
        if hasattr(self, "manager"):
            check_empty(self.manager)
            assert self.kv.reset_prefix_cache()


@pytest.mark.timeout(900)
def test_random_requests():
    run_state_machine_as_test(BlockManagerMachine, settings=fuzz_settings(examples=160, steps=60))
    assert BlockManagerMachine.steps >= 4_000
    assert BlockManagerMachine.seen == {
        "decode",
        "hit",
        "hit of a part of a page",
        "out of pages",
        "page closed early",
        "preempted",
        "visual hit",
        "visual page",
    }
