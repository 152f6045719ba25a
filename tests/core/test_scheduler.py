"""The scheduler for mixed pages under random load, synchronous and asynchronous.

A state machine feeds a real scheduler and plays the worker: block tables are kept from what
``SchedulerOutput`` says, as vLLM's model runner keeps them, pages are written in the order of the
steps, and sampled tokens come back one or two steps later.  In the mode ``text`` vLLM's own
scheduler gets the same requests, and every output must be the same.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

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
    cache_config,
    check_empty,
    check_pool,
    fuzz_settings,
    make_request,
    mixed_spec,
    plain_spec,
)
from tests.core.test_layout import chunked
from tests.core.test_manager import SLOTS, free_list, media, prompts, texts
from tests.reference.checkpoints import make_checkpoint
from vllm_calibquant.core.scheduler import MixedPageAsyncScheduler, MixedPageScheduler
from vllm_calibquant.core.spans import Span

MAX_TOKENS = 8192
"""Most tokens of a step, of a request, and of the encoder cache."""
MAX_REQUESTS = 5

CONFIGS: dict[tuple[str, bool], VllmConfig] = {}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Finished configurations of a vision-language model, by KV cache dtype and async or not."""
    model = make_checkpoint("llava", tmp_path_factory.mktemp("llava"))
    for dtype in ("auto", "calibquant1"):
        for asynchronous in (False, True):
            CONFIGS[dtype, asynchronous] = make_config(model, dtype, asynchronous)


def make_config(model: Path, dtype: str, asynchronous: bool) -> VllmConfig:
    config = EngineArgs(
        model=str(model),
        kv_cache_dtype=dtype,
        block_size=BLOCK,
        max_model_len=MAX_TOKENS,
        hf_overrides={"text_config": {"max_position_embeddings": MAX_TOKENS}},
        max_num_batched_tokens=MAX_TOKENS,
        max_num_seqs=MAX_REQUESTS,
    ).create_engine_config()
    # The CPU platform turns async scheduling off; schedulers themselves need no device.
    config.scheduler_config.async_scheduling = asynchronous
    return config


@cache
def grammars(dtype: str, asynchronous: bool) -> StructuredOutputManager:
    return StructuredOutputManager(CONFIGS[dtype, asynchronous])


def make_scheduler(bits: int | None, num_blocks: int, asynchronous: bool = False) -> Scheduler:
    """A scheduler for mixed pages, or vLLM's own where ``bits`` is None."""
    dtype = "auto" if bits is None else "calibquant1"  # the spec below has the bits
    config = CONFIGS[dtype, asynchronous]
    config.cache_config.num_gpu_blocks = num_blocks
    config.scheduler_config.long_prefill_token_threshold = 0
    if bits is None:
        cls, spec = (AsyncScheduler if asynchronous else Scheduler), plain_spec()
    else:
        cls, spec = (
            MixedPageAsyncScheduler if asynchronous else MixedPageScheduler,
            mixed_spec(bits),
        )
    return cls(
        config,
        cache_config(spec, num_blocks),
        grammars(dtype, asynchronous),
        block_size=BLOCK,
        log_stats=True,
    )


class Worker:
    """What a model runner knows: block tables and encoder outputs, from scheduler outputs alone."""

    def __init__(self, slots: int) -> None:
        self.tables: dict[str, list[int]] = {}
        self.encoded: set[str] = set()
        self.contents = Contents(slots)

    def execute(self, output: SchedulerOutput, tapes: dict[str, Tape]) -> None:
        """Write the K and V of a step, and check what each request reads."""
        for request_id in output.finished_req_ids | output.preempted_req_ids:
            self.tables.pop(request_id, None)
        before = {i: {j % FIRST_TAG for j in table} for i, table in self.tables.items()}
        self.encoded.difference_update(output.free_encoder_mm_hashes)
        starts: dict[str, tuple[int, int]] = {}  # computed tokens, and blocks held before the step
        for new in output.scheduled_new_reqs:
            # A streaming session comes back as a new request with all its blocks.
            held = len(self.tables.get(new.req_id, ())) or new.num_computed_tokens // BLOCK
            self.tables[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens, held
        cached = output.scheduled_cached_reqs
        for request_id, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self.tables[request_id] = list(ids[0])
                held = computed // BLOCK
            else:
                held = len(self.tables[request_id])
                self.tables[request_id].extend(ids[0] if ids else ())
            starts[request_id] = computed, held
        assert starts.keys() == output.num_scheduled_tokens.keys()

        for request_id, (start, held) in starts.items():
            tape, table = tapes[request_id], self.tables[request_id]
            end = start + output.num_scheduled_tokens[request_id]
            features = tape.request.mm_features
            for i in output.scheduled_encoder_inputs.get(request_id, ()):
                self.encoded.add(features[i].identifier)
            tape.upto(0)
            needed = {tape.embedded[t][0] for t in range(start, end) if t in tape.embedded}
            assert needed <= self.encoded, "an embedding was needed before the encoder ran"
            others = set().union(*(pages for i, pages in before.items() if i != request_id))
            self.contents.write(tape, table, start, end, held, others)
        for request_id, (start, _) in starts.items():
            end = start + output.num_scheduled_tokens[request_id]
            self.contents.check_reads(tapes[request_id], self.tables[request_id], end)


class SchedulerMachine(RuleBasedStateMachine):
    """Random load on a scheduler, with a stock twin for text."""

    steps = 0
    """Steps with work in them, over all examples."""
    seen: set[str] = set()  # noqa: RUF012

    @initialize(
        text_only=st.sampled_from([False, False, False, True]),
        asynchronous=st.booleans(),
        bits=st.sampled_from([1, 1, 2, 4]),
        num_blocks=st.sampled_from([60, 90, 150, 600]),
    )
    def start(self, text_only: bool, asynchronous: bool, bits: int, num_blocks: int) -> None:
        self.text_only = text_only
        self.depth = 2 if asynchronous else 1
        self.bits, self.num_blocks = bits, num_blocks
        self.scheduler = make_scheduler(bits, num_blocks, asynchronous)
        self.twin = make_scheduler(None, num_blocks, asynchronous) if text_only else None
        (self.manager,) = self.scheduler.mixed_page_managers
        self.watch = PromiseWatch(self.manager)
        self.worker = Worker(SLOTS[bits])
        self.hashes = HashBook()
        self.tapes: dict[str, Tape] = {}
        self.in_flight: deque[tuple[SchedulerOutput, SchedulerOutput | None]] = deque()
        self.past: list[list[Segment]] = [[Text.of(30, 0)]]
        self.count = 0

    @precondition(lambda self: len(self.tapes) < 8)
    @rule(
        new=prompts,
        base=st.integers(0, 99),
        keep=st.integers(0, 6),
        max_tokens=st.integers(1, 40),
        resumable=st.sampled_from([False] * 3 + [True]),
    )
    def add(
        self, new: list[Segment], base: int, keep: int, max_tokens: int, resumable: bool
    ) -> None:
        """A request that shares its first parts with an earlier one, or none."""
        segments = self.past[base % len(self.past)][:keep] + new
        if self.text_only:
            segments = [s if isinstance(s, Text) else Text.of(s.embeds, 9) for s in segments]
        # A request must fit the pool alone, even if chunks cut each of its images to single blocks.
        while self.size(segments) + max_tokens > min((self.num_blocks - 2) * BLOCK, MAX_TOKENS - 1):
            segments = segments[1:] or [Text.of(3, 1)]
            max_tokens = min(max_tokens, 40)
        self.past.append(segments)
        request_id = f"r{self.count}"
        self.count += 1
        for scheduler in self.schedulers():
            request = make_request(request_id, segments, max_tokens, resumable=resumable)
            scheduler.add_request(request)
            if scheduler is self.scheduler:
                self.tapes[request_id] = Tape(request)
        self.check()

    @staticmethod
    def size(segments: list[Segment]) -> int:
        return sum(len(s.tokens) if isinstance(s, Text) else len(s.mask) for s in segments)

    @rule(
        count=st.integers(3, 25),
        budget=st.one_of(
            st.just(MAX_TOKENS), st.integers(1, 300), st.sampled_from([100, 512, 2048])
        ),
        threshold=st.sampled_from([0, 0, 0, 40, 300]),
    )
    def run(self, count: int, budget: int, threshold: int) -> None:
        """Steps with a token budget, and with a limit on the chunks of one request."""
        for _ in range(count):
            if not self.tapes:
                break
            self.schedule(budget, threshold)
            self.check()
            while len(self.in_flight) >= self.depth:
                self.update()
                self.check()

    @precondition(lambda self: self.tapes)
    @rule(index=st.integers(0, 99))
    def abort(self, index: int) -> None:
        """Abort a request in any state, perhaps while a step of it is in flight."""
        self.abort_all([list(self.tapes)[index % len(self.tapes)]])
        self.seen.add("abort")
        self.check()

    def sessions(self) -> list[Request]:
        """Streaming sessions whose end has not been announced."""
        requests = [tape.request for tape in self.tapes.values()]
        return [r for r in requests if r.resumable and None not in r.streaming_queue]

    @precondition(sessions)
    @rule(index=st.integers(0, 99), new=st.lists(st.one_of(texts, media, media), max_size=3))
    def next_input(self, index: int, new: list[Segment]) -> None:
        """The next input of a streaming session, or its end."""
        session = self.sessions()[index % len(self.sessions())]
        queued = sum(len(update.prompt_token_ids) for update in session.streaming_queue)
        room = (
            min((self.num_blocks - 2) * BLOCK, MAX_TOKENS - 1) - session.num_tokens - queued - 100
        )
        if self.text_only:
            new = [s if isinstance(s, Text) else Text.of(s.embeds, 9) for s in new]
        if self.size(new) > room:
            new = []
        for scheduler in self.schedulers():
            update = make_request(session.request_id, new, 5, resumable=bool(new))
            scheduler.add_request(update)
        self.seen.add("session")
        if any(isinstance(s, Media) for s in new):
            self.seen.add("session image")
        self.forget_finished()
        self.check()

    @rule(force=st.booleans())
    def reset(self, force: bool) -> None:
        """Reset the prefix cache, with running requests preempted or not."""
        idle = not any(self.manager.req_to_blocks.values())
        # A session between two inputs keeps its blocks and cannot be preempted.
        holders = {request_id for request_id, ids in self.manager.req_to_blocks.items() if ids}
        force = force and holders <= {r.request_id for r in self.scheduler.running}
        for scheduler in self.schedulers():
            assert scheduler.reset_prefix_cache(reset_running_requests=force) == (idle or force)
        self.check()

    # A step.

    def schedule(self, budget: int, threshold: int) -> None:
        outputs = []
        for scheduler in self.schedulers():
            scheduler.max_num_scheduled_tokens = budget
            scheduler.scheduler_config.long_prefill_token_threshold = threshold
            outputs.append(scheduler.schedule())
        output, stock = outputs[0], outputs[1] if self.twin else None
        if stock is not None:
            assert summary(output) == summary(stock)
        scheduled = output.num_scheduled_tokens
        assert sum(scheduled.values()) == output.total_num_scheduled_tokens <= budget
        if output.preempted_req_ids:
            self.seen.add("preempted")
        hits = [r for r in output.scheduled_new_reqs if r.num_computed_tokens]
        if hits:
            self.seen.add("hit")
        if any(
            i >= FIRST_TAG for r in hits for i in r.block_ids[0][: r.num_computed_tokens // BLOCK]
        ):
            self.seen.add("visual hit")
        self.worker.execute(output, self.tapes)
        if self.worker.contents.visual_pages_written:
            self.seen.add("visual page")
        self.in_flight.append((output, stock))
        type(self).steps += bool(scheduled)

    def update(self) -> None:
        """Hand the sampled tokens of the oldest step in flight to the scheduler."""
        output, stock = self.in_flight.popleft()
        results = [self.sample(output) for _ in self.schedulers()]
        self.scheduler.update_from_output(output, results[0])
        if stock is not None:
            self.twin.update_from_output(stock, results[1])
        self.forget_finished()

    def abort_all(self, request_ids: Iterable[str]) -> None:
        for request_id in list(request_ids):
            for scheduler in self.schedulers():
                scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.forget_finished()

    def sample(self, output: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        ends = self.ends(output)
        tokens = []
        for request_id in ids:
            tape = self.tapes.get(request_id)
            end = ends[request_id]
            if tape is None or end < tape.request.num_tokens:
                tokens.append([])  # the request ended, or the chunk was not the last of the prompt
            else:
                tokens.append([tape.upto(end)[end - 1] % 1000])
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=tokens,
        )

    @staticmethod
    def ends(output: SchedulerOutput) -> dict[str, int]:
        """Position after the last that a step computes, for each request."""
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts.update({r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs})
        return {i: starts[i] + n for i, n in output.num_scheduled_tokens.items()}

    # Checks.

    def schedulers(self) -> list[Scheduler]:
        return [self.scheduler, self.twin] if self.twin else [self.scheduler]

    def forget_finished(self) -> None:
        for request_id in self.tapes.keys() - self.scheduler.requests.keys():
            tape = self.tapes.pop(request_id)
            self.hashes.note(tape)
            if tape.request.output_token_ids:
                self.seen.add("finished")
                number = int(request_id[1:]) + 1
                answer = Text(tuple(tape.request.output_token_ids))
                if not tape.request.resumable:
                    self.past[number] = [*self.past[number], answer]

    def check(self) -> None:
        for tape in self.tapes.values():
            self.hashes.note(tape)
        blocks = self.manager.req_to_blocks
        for request in self.scheduler.running:
            ids = [b.block_id for b in blocks[request.request_id]]
            assert ids == self.worker.tables[request.request_id]
        check_pool(self.manager, self.tapes, self.worker.contents, self.hashes)
        self.check_counts()
        if self.twin:
            ours, stock = (s.kv_cache_manager.block_pool for s in self.schedulers())
            assert free_list(ours) == free_list(stock)

    def check_counts(self) -> None:
        """What the operator sees is what requests hold."""
        ids = {b.block_id for blocks in self.manager.req_to_blocks.values() for b in blocks}
        visual = {i % FIRST_TAG for i in ids if i >= FIRST_TAG}
        slots = sum(len(self.worker.contents.pages[page]) for page in visual)
        counts = self.scheduler.page_counts()
        assert counts.pages == len({i % FIRST_TAG for i in ids})
        assert counts.visual_pages == len(visual)
        assert counts.visual_tokens == slots * BLOCK
        page_bytes = self.manager.kv_cache_spec.page_size_bytes
        assert counts.bytes_saved == (slots - len(visual)) * page_bytes

    def teardown(self) -> None:
        """Let half of the requests finish and abort the others: nothing may be left."""
        if not hasattr(self, "manager"):
            return
        self.abort_all(list(self.tapes)[::2])
        for _ in range(400):
            # A session that waits for input keeps its pages, and the others may need them.
            self.abort_all(
                i
                for i, tape in self.tapes.items()
                if tape.request.status == RequestStatus.WAITING_FOR_STREAMING_REQ
            )
            if not self.tapes:
                break
            self.schedule(MAX_TOKENS, 0)
            while len(self.in_flight) >= self.depth:
                self.update()
        else:
            raise AssertionError("requests do not finish")
        while self.in_flight:
            self.update()
        self.check()
        check_empty(self.manager, [self.tapes, self.scheduler.requests])
        assert self.scheduler.reset_prefix_cache()
        assert tuple(self.scheduler.page_counts()) == (0, 0, 0, 0)


def summary(output: SchedulerOutput) -> dict:
    """What a scheduler decided, without objects that compare by identity."""
    cached = output.scheduled_cached_reqs
    return {
        "new": [(r.req_id, r.block_ids, r.num_computed_tokens) for r in output.scheduled_new_reqs],
        "cached": (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens),
        "resumed": cached.resumed_req_ids,
        "tokens": output.num_scheduled_tokens,
        "finished": output.finished_req_ids,
        "preempted": output.preempted_req_ids,
    }


@pytest.mark.timeout(900)
def test_random_load():
    run_state_machine_as_test(SchedulerMachine, settings=fuzz_settings(examples=200, steps=50))
    assert SchedulerMachine.steps >= 6_000
    assert SchedulerMachine.seen == {
        "abort",
        "finished",
        "hit",
        "preempted",
        "session",
        "session image",
        "visual hit",
        "visual page",
    }


def run_alone(segments: list[Segment], budget: int, scheduler: Scheduler) -> list[int]:
    """Compute the prompt of one request and return its block ids before the end."""
    request = make_request(f"alone{budget}", segments, max_tokens=1)
    tape = Tape(request)
    scheduler.add_request(request)
    scheduler.max_num_scheduled_tokens = budget
    ids: list[int] = []
    while not request.is_finished():
        output = scheduler.schedule()
        ids = scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
        end = SchedulerMachine.ends(output)[request.request_id]
        result = ModelRunnerOutput(
            req_ids=[request.request_id],
            req_id_to_index={request.request_id: 0},
            sampled_token_ids=[[tape.next_token()]] if end == request.num_tokens else [[]],
        )
        scheduler.update_from_output(output, result)
    return ids


@pytest.mark.parametrize("budget", [100, 256, 512, 2048, 8192])
def test_chunks_of_an_image_fill_pages(budget):
    """The scheduler ends chunks where :func:`clip_chunk` says, from a cold or a warm start."""
    scheduler = make_scheduler(1, 500)
    span = Span(10, 3338)
    segments = [Text.of(10, 0), Media(3328, 0), Text.of(5, 0)]
    ids = run_alone(segments, budget, scheduler)
    pages, _ = chunked([span], 3343, budget, 14, clip=True)
    assert len({i % FIRST_TAG for i in ids}) == pages

    # After a hit of the text and the first image, the second image starts in the middle of a chunk.
    again = [*segments[:2], Text.of(7, 1), Media(700, 1), Text.of(5, 0)]
    hit = ids[: 3338 // BLOCK]
    ids = run_alone([*again], budget + 1, scheduler)
    assert ids[: len(hit)] == hit
    spans = [span, Span(3345, 4045)]
    pages, _ = chunked(spans, 4050, budget + 1, 14, clip=True, start=len(hit) * BLOCK)
    assert len({i % FIRST_TAG for i in ids[len(hit) :]}) == pages


def serve(
    scheduler: Scheduler, *requests: Request, depth: int = 1, tokens: int = MAX_TOKENS
) -> dict[str, RequestStatus]:
    """How requests are after 150 steps, so many of them in flight; chunks of so many tokens from
    the first preemption on.
    """
    known = {request.request_id: request for request in requests}
    in_flight: deque[SchedulerOutput] = deque()
    for _ in range(150):
        output = scheduler.schedule()
        if output.preempted_req_ids:
            scheduler.max_num_scheduled_tokens = tokens
        in_flight.append(output)
        if len(in_flight) < depth:
            continue
        output = in_flight.popleft()
        ends = SchedulerMachine.ends(output)
        result = ModelRunnerOutput(
            req_ids=[*ends],
            req_id_to_index={request_id: i for i, request_id in enumerate(ends)},
            sampled_token_ids=[[1] * (end >= known[i].num_tokens) for i, end in ends.items()],
        )
        scheduler.update_from_output(output, result)
    return {request_id: request.status for request_id, request in known.items()}


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_who_ran_out_of_pages_alone_is_computed_anew(depth):
    """Pages that small chunks left partly filled; steps in flight are waited for, not judged."""
    scheduler = make_scheduler(1, 28, asynchronous=True)
    request = make_request("alone", [Text.of(5, 0), Media(1100, 0), Text.of(20, 0)], max_tokens=5)
    scheduler.add_request(request)
    scheduler.max_num_scheduled_tokens = 33
    statuses = serve(scheduler, request, depth=depth)
    assert request.num_preemptions > 0
    assert statuses == {"alone": RequestStatus.FINISHED_LENGTH_CAPPED}


def test_a_limit_on_long_prompts_refuses_nobody_who_fits():
    """While others wait, vLLM computes 64 tokens of a prompt at a time: four blocks a page."""
    scheduler = make_scheduler(1, 16)
    scheduler.scheduler_config.long_prefill_token_threshold = 64
    requests = [
        make_request(name, [Text.of(5, i), Media(1100, i), Text.of(20, i)], max_tokens=5)
        for i, name in enumerate("ab")
    ]
    for request in requests:
        scheduler.add_request(request)
    statuses = serve(scheduler, *requests)
    assert {*statuses.values()} == {RequestStatus.FINISHED_LENGTH_CAPPED}
    assert scheduler.scheduler_config.long_prefill_token_threshold == 64
    assert scheduler.max_num_active_reqs == MAX_REQUESTS
    assert "allocate_slots" not in vars(scheduler.kv_cache_manager)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("num_blocks", range(13, 22))
def test_chunks_that_end_before_an_image_are_known(num_blocks, whole, monkeypatch):
    """Room for one image at a time in the encoder: each begins a chunk, and so a page."""
    scheduler = make_scheduler(1, num_blocks)
    config = scheduler.scheduler_config
    monkeypatch.setattr(config, "max_num_batched_tokens", 1000)
    monkeypatch.setattr(config, "disable_chunked_mm_input", whole)
    scheduler.max_num_encoder_input_tokens = scheduler.max_num_scheduled_tokens = 1000
    scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1000)
    images = [part for i in range(3) for part in (Text.of(1, i), Media(576, i))]
    request = make_request("images", [*images, Text.of(10, 2)], max_tokens=100)
    scheduler.add_request(request)
    fits = request.max_tokens
    (status,) = serve(scheduler, request, tokens=1000).values()
    if num_blocks == 13:  # 11 visual pages and 2 of text
        assert status == RequestStatus.FINISHED_ERROR
        return
    assert status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert request.num_output_tokens == fits == min(4 + 16 * (num_blocks - 14), 100)
    assert request.num_preemptions == 0


class SlowTransfer:
    """An EC connector that still fetches an image; all else that vLLM asks it does not matter."""

    def __init__(self) -> None:
        self.asked = 0

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        self.asked += 1
        return self.asked > 6

    def take_unavailable_requests(self) -> set[str]:
        return set()

    def has_pending_push_work(self) -> bool:
        return False

    def has_cache_item(self, identifier: str) -> bool:
        return False

    def request_finished(self, request: Request) -> tuple[bool, None]:
        return False, None

    def get_ec_connector_stats(self) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def test_who_waits_for_an_image_is_not_out_of_pages():
    scheduler = make_scheduler(1, 100)
    scheduler.ec_connector = transfer = SlowTransfer()
    request = make_request("waits", [Media(576, 0), Text.of(10, 2)], max_tokens=5)
    scheduler.add_request(request)
    statuses = serve(scheduler, request)
    assert transfer.asked > 6
    assert statuses == {"waits": RequestStatus.FINISHED_LENGTH_CAPPED}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("length", "answer"), [(303, 18), (320, 1), (321, None)])
def test_the_last_token_is_never_stored(length, answer, depth):
    scheduler = make_scheduler(1, 21, asynchronous=depth > 1)
    request = make_request("long", [Text.of(length, 0)], max_tokens=100)
    scheduler.add_request(request)
    (status,) = serve(scheduler, request, depth=depth).values()
    if answer is None:
        assert status == RequestStatus.FINISHED_ERROR
    else:
        assert status == RequestStatus.FINISHED_LENGTH_CAPPED
        assert request.num_output_tokens == answer


def test_a_session_longer_than_the_pool_keeps_nobody_waiting():
    scheduler = make_scheduler(1, 20)
    session = make_request("session", [Text.of(200, 0)], max_tokens=2, resumable=True)
    scheduler.add_request(session)
    statuses = serve(scheduler, session)
    assert statuses == {"session": RequestStatus.WAITING_FOR_STREAMING_REQ}
    scheduler.add_request(make_request("session", [Text.of(200, 1)], 2, resumable=True))
    other = make_request("other", [Text.of(20, 3)], max_tokens=2)
    scheduler.add_request(other)
    assert serve(scheduler, session, other) == {
        "session": RequestStatus.FINISHED_ERROR,
        "other": RequestStatus.FINISHED_LENGTH_CAPPED,
    }


def test_a_scheduler_without_mixed_pages_does_not_start():
    config = CONFIGS["calibquant1", False]
    config.cache_config.num_gpu_blocks = 10
    with pytest.raises(RuntimeError, match="no layer has mixed pages"):
        MixedPageScheduler(
            config,
            cache_config(plain_spec(), 10),
            grammars("calibquant1", False),
            block_size=BLOCK,
        )
