"""What :mod:`benchmarks.serving` measures on one engine: a generator of cells for each scenario.

A cell is one row of a record: a flat mapping of what was set, what was found, and raw samples.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving_engine import BenchEngine, Completion, Picture, Run
from benchmarks.serving_http import DRY_LOAD, LOADS, Load

GB = 1e9
BEFORE, AFTER = 10, 8
"""Text tokens before and after an image: a short instruction, and the end of a short question."""
WARM_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    tiles: tuple[int, int] = (4, 3)
    """Of an image, across and down."""
    budgets: tuple[float, ...] = (5, 2, 10, 20)
    """KV budgets in GB, the most telling first."""
    resident_outputs: tuple[int, ...] = (128, 300)
    decode_outputs: int = 300
    end_to_end_outputs: int = 1024
    end_to_end_budgets: tuple[float, ...] = (5,)
    chat_budget: float = 2
    working_sets: tuple[int, ...] = (6,)
    chat_images: int = 1
    """Of a user, all in the first turn."""
    chat_turns: int = 8
    chat_question: int = 16
    chat_answer: int = 32
    chat_concurrency: int = 8
    chat_limit_s: float = 20
    long_budget: float = 20
    long_images: int = 5
    long_outputs: int = 48
    video_budget: float = 0.5
    video_outputs: int = 24
    video_images: tuple[int, ...] = (5, 20, 40)
    """Cold requests of so many images of the largest size, one after the other."""
    frame_tokens: int = 256
    frame_text: int = 8
    lone_requests: int = 7
    text_requests: int = 128
    text_prompt: int = 512
    text_outputs: int = 128
    text_repeats: int = 2
    step_outputs: int = 64
    mix_budget: float = 5
    mix_tokens: int = 3328
    mix_shares: tuple[int, ...] = (0, 25, 50, 75, 90, 100)
    mix_outputs: int = 48
    http_starts: int = Load().starts
    """Of servers, in :mod:`benchmarks.serving_http`."""
    http_repeats: int = Load().repeats
    """Of what it repeats with each start."""
    http_loads: tuple[str, ...] = LOADS
    """What it asks for at all."""
    cell_limit_s: float = 60
    """A cell that takes longer is cut off, and says so."""


DRY_RUN = Plan(
    tiles=(1, 1),
    budgets=(0.002, 0.001),
    resident_outputs=(12, 20),
    decode_outputs=12,
    end_to_end_outputs=12,
    end_to_end_budgets=(0.001,),
    chat_budget=0.002,
    working_sets=(2,),
    chat_images=2,
    chat_turns=4,
    chat_question=8,
    chat_answer=4,
    chat_concurrency=2,
    chat_limit_s=6,
    long_budget=0.002,
    long_images=2,
    long_outputs=6,
    video_budget=0.0008,
    video_outputs=4,
    video_images=(2,),
    frame_text=4,
    lone_requests=2,
    text_requests=4,
    text_prompt=40,
    text_outputs=6,
    text_repeats=1,
    step_outputs=6,
    mix_budget=0.001,
    mix_tokens=512,
    mix_shares=(0, 50, 100),
    mix_outputs=6,
    http_starts=DRY_LOAD.starts,
    http_repeats=DRY_LOAD.repeats,
    cell_limit_s=20,
)
"""The same on the CPU, with ``internvl-tiny``."""


@dataclass
class Context:
    """One engine, and what its scenarios share."""

    engine: BenchEngine
    plan: Plan
    picture: Picture
    seed: int = 0
    names: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = (f"image-{i}" for i in range(1 << 30))

    def image_request(
        self, outputs: int, images: int = 1, salt: str | None = None, after: int = AFTER
    ) -> Any:
        """A request of images that no other request has."""
        parts: list[Any] = [BEFORE]
        for _ in range(images):
            parts.append((next(self.names), self.picture))
        parts.append(after)
        return self.engine.request(parts, outputs, salt=salt or next(self.names))

    def text_request(self, prompt: int, outputs: int) -> Any:
        """A request of text that no other request has."""
        return self.engine.request([prompt], outputs, salt=next(self.names))


def milliseconds(values: Sequence[float]) -> list[float]:
    """As raw samples of a record."""
    return [round(1e3 * v, 2) for v in values]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def first_tokens(run: Run) -> list[float]:
    """Seconds to the first token of each request that got one."""
    return [c.first - c.submitted for c in run.completions.values() if c.first is not None]


def step_seconds(run: Run, requests: int) -> list[float]:
    """Seconds between successive steps that each gave all requests a token."""
    pairs = zip(run.steps, run.steps[1:], strict=False)
    return [b.time - a.time for a, b in pairs if a.tokens == b.tokens == requests]


def fitting(context: Context, make: Callable[[int], Any], outputs: int) -> tuple[int, int, int]:
    """Requests that a pool holds up to their last token, pages of one, and of its prompt."""
    engine = context.engine
    request = make(outputs)
    pages = engine.pages_of(request)
    free = engine.pool.get_num_free_blocks()
    if pages is None:
        return 0, 0, 0
    at_end = engine.pages_at_end(pages, request.num_prompt_tokens, outputs)
    most = engine.config.scheduler_config.max_num_seqs
    return min(free // at_end, most), at_end, pages


def decode_cell(
    context: Context, budget: float, outputs: int, make: Callable[[int], Any], **what: Any
) -> dict[str, Any]:
    """As many requests as a pool holds, their prompts planted, decoded to their last token."""
    engine = context.engine
    pages = engine.set_budget(budget * GB)
    requests, at_end, prompt_pages = fitting(context, make, outputs)
    most = engine.config.scheduler_config.max_num_seqs
    cell = {
        **what,
        "budget_gb": budget,
        "outputs": outputs,
        "pool_pages": pages,
        "page_bytes": engine.page_bytes,
        "pages_a_request": at_end,
        "prompt_pages": prompt_pages,
        "requests": requests,
    }
    if not requests:
        return {**cell, "does_not_fit": True}
    engine.forget()
    batch = [make(outputs) for _ in range(requests)]
    cell["prompt_tokens"] = batch[0].num_prompt_tokens
    engine.plant(batch)
    run = engine.run(batch, limit_s=context.plan.cell_limit_s)
    tokens, seconds = run.full_batch(requests)
    steps = step_seconds(run, requests)
    return {
        **cell,
        "limited_by_max_num_seqs": requests == most,
        "most_running": run.most_running,
        "preemptions": run.preemptions,
        "timed_out": run.timed_out,
        "planted_share": round(
            statistics.mean(c.cached / c.prompt_tokens for c in run.completions.values()), 4
        ),
        "decode_tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "step_ms_median": round(1e3 * statistics.median(steps), 3) if steps else None,
        "step_ms_p99": round(1e3 * percentile(steps, 0.99), 3) if steps else None,
        "step_ms": milliseconds(steps),
    }


def resident(context: Context) -> Iterator[dict[str, Any]]:
    """Requests of one image that fit, and the speed of decoding them, at the first budget."""
    budget = context.plan.budgets[0]
    for outputs in context.plan.resident_outputs:
        yield decode_cell(context, budget, outputs, context.image_request)


def decode(context: Context) -> Iterator[dict[str, Any]]:
    """The same at the other budgets."""
    for budget in context.plan.budgets[1:]:
        yield decode_cell(context, budget, context.plan.decode_outputs, context.image_request)


def end_to_end(context: Context) -> Iterator[dict[str, Any]]:
    """As many requests of one image as fit, all submitted at once, prompts computed."""
    engine, plan = context.engine, context.plan
    for budget in plan.end_to_end_budgets:
        outputs = plan.end_to_end_outputs
        pages = engine.set_budget(budget * GB)
        requests, at_end, _ = fitting(context, context.image_request, outputs)
        engine.forget()
        cell = {
            "budget_gb": budget,
            "outputs": outputs,
            "pool_pages": pages,
            "pages_a_request": at_end,
            "requests": requests,
        }
        if not requests:
            yield {**cell, "does_not_fit": True}
            continue
        batch = [context.image_request(outputs) for _ in range(requests)]
        run = engine.run(batch, limit_s=2 * plan.cell_limit_s)
        seconds = run.steps[-1].time - run.start
        first = first_tokens(run)
        steps = step_seconds(run, requests)
        yield {
            **cell,
            "preemptions": run.preemptions,
            "timed_out": run.timed_out,
            "seconds": round(seconds, 3),
            "output_tokens_per_s": round(sum(s.tokens for s in run.steps) / seconds, 1),
            "prefill_s": round(max(first), 3),
            "first_token_ms_median": round(1e3 * statistics.median(first), 1),
            "first_token_ms_p99": round(1e3 * percentile(first, 0.99), 1),
            "inter_token_ms_median": round(1e3 * statistics.median(steps), 3) if steps else None,
            "inter_token_ms_p99": round(1e3 * percentile(steps, 0.99), 3) if steps else None,
            "first_token_ms": milliseconds(first),
            "step_ms": milliseconds(steps),
        }


def bf16_page_bytes(engine: BenchEngine) -> int:
    """Bytes of 16 tokens at 16 bits, all layers."""
    model, parallel = engine.config.model_config, engine.config.parallel_config
    heads = model.get_num_kv_heads(parallel)
    return 16 * 2 * 2 * heads * model.get_head_size() * model.get_num_layers(parallel)


def image_chats(context: Context) -> Iterator[dict[str, Any]]:
    """Users with images of their own come back for turns in random order, few at a time.

    First turns are not measured.  The order is the same for all KV cache dtypes; a user whose last
    turn is being answered is passed over.
    """
    for working_set in context.plan.working_sets:
        yield _chats(context, working_set)


def _chats(context: Context, working_set: int) -> dict[str, Any]:
    engine, plan = context.engine, context.plan
    pages = engine.set_budget(plan.chat_budget * GB)
    turn = plan.chat_question + plan.chat_answer
    length = BEFORE + plan.chat_images * len(context.picture.tokens) + plan.chat_turns * turn
    held = plan.chat_budget * GB / (bf16_page_bytes(engine) * -(-length // 16))
    users = round(working_set * held)
    history: list[list[Any]] = [
        [BEFORE, *((next(context.names), context.picture) for _ in range(plan.chat_images))]
        for _ in range(users)
    ]
    order = random.Random(context.seed)
    waiting = [u for u in range(users) for _ in range(plan.chat_turns - 1)]
    order.shuffle(waiting)
    cell = {
        "budget_gb": plan.chat_budget,
        "working_set": working_set,
        "pool_pages": pages,
        "users": users,
        "images_a_user": plan.chat_images,
        "turns_a_user": plan.chat_turns,
        "question_tokens": plan.chat_question,
        "answer_tokens": plan.chat_answer,
        "concurrency": plan.chat_concurrency,
        "bf16_chats_held": round(held, 2),
    }
    if users < plan.chat_concurrency:
        return {**cell, "does_not_fit": True}
    live: dict[str, tuple[int, Any]] = {}

    def ask(user: int) -> Any:
        question = [10 + (user + 3 * i) % 200 for i in range(plan.chat_question)]
        history[user].append(question)
        request = engine.request(history[user], plan.chat_answer)
        live[request.request_id] = (user, request)
        return request

    def answered(completion: Completion) -> None:
        user, request = live.pop(completion.name)
        history[user].append(list(request.output_token_ids))

    def next_first(completion: Completion) -> list[Any]:
        answered(completion)
        return [ask(user) for user in [next(first, None)] if user is not None]

    def next_turn(completion: Completion) -> list[Any]:
        answered(completion)
        return draw()

    def draw() -> list[Any]:
        busy = {user for user, _ in live.values()}
        for i, user in enumerate(waiting):
            if user not in busy:
                del waiting[i]
                return [ask(user)]
        return []

    first = iter(range(users))
    few = min(plan.chat_concurrency, users)
    warm = [ask(next(first)) for _ in range(few)]
    cold = engine.run(warm, then=next_first, limit_s=2 * plan.cell_limit_s)
    if cold.timed_out:
        return {**cell, "timed_out": True}
    begin = [request for _ in range(few) for request in draw()]
    run = engine.run(begin, then=next_turn, limit_s=plan.chat_limit_s)
    done = run.done
    seconds = run.steps[-1].time - run.start
    # What was submitted and not finished got its first token all the same.
    times = first_tokens(run)
    asked = [c for c in run.completions.values() if c.first is not None]
    return {
        **cell,
        "seconds": round(seconds, 3),
        "cut_off_by_time": run.timed_out,
        "preemptions": run.preemptions,
        "turns": len(done),
        "turns_per_s": round(len(done) / seconds, 3),
        "hit_rate": round(sum(c.cached for c in asked) / sum(c.prompt_tokens for c in asked), 4),
        "first_token_ms_median": round(1e3 * statistics.median(times), 2),
        "first_token_ms_mean": round(1e3 * statistics.mean(times), 2),
        "first_token_ms_p99": round(1e3 * percentile(times, 0.99), 2),
        "first_turn_ms_median": round(1e3 * statistics.median(first_tokens(cold)), 2),
        "first_token_ms": milliseconds(times),
    }


def long_context(context: Context) -> Iterator[dict[str, Any]]:
    """Decoding of requests with several images each, planted, as many as fit."""
    plan = context.plan
    visual = plan.long_images * context.picture.visual_tokens
    # What is planted covers all images: none must be encoded, which would let in two a step.
    after = AFTER + max(context.engine.block_sizes)
    yield decode_cell(
        context,
        plan.long_budget,
        plan.long_outputs,
        lambda outputs: context.image_request(outputs, plan.long_images, after=after),
        visual_tokens=visual,
    )


def longest_video(context: Context) -> Iterator[dict[str, Any]]:
    """The longest video that a pool holds with its answer, found by halving, and its decoding.

    Two layouts of its tokens: one span, as Qwen2.5-VL has them, and frames with a few tokens of
    text between, as InternVL has them.
    """
    engine, plan = context.engine, context.plan
    longest = engine.config.model_config.max_model_len
    after = AFTER + max(engine.block_sizes)  # what is planted must cover all images

    def contiguous(tokens: int) -> Any:
        parts = [BEFORE, (next(context.names), context.picture, max(tokens, 16)), after]
        return engine.request(parts, plan.video_outputs, salt=next(context.names))

    def frames(tokens: int) -> Any:
        parts: list[Any] = [BEFORE]
        for _ in range(max(tokens // plan.frame_tokens, 1)):
            parts += [(next(context.names), context.picture, plan.frame_tokens), plan.frame_text]
        parts.append(after)
        return engine.request(parts, plan.video_outputs, salt=next(context.names))

    for layout, make in (("one span", contiguous), ("frames", frames)):
        pages = engine.set_budget(plan.video_budget * GB)

        def fits(tokens: int, make: Callable[[int], Any] = make, pages: int = pages) -> bool:
            request = make(tokens)
            if request.num_prompt_tokens + plan.video_outputs > longest:
                return False
            found = engine.pages_of(request)
            engine.forget()
            return found is not None and (
                engine.pages_at_end(found, request.num_prompt_tokens, plan.video_outputs) <= pages
            )

        low, high = 0, longest
        while high - low > 64:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        cell: dict[str, Any] = {
            "budget_gb": plan.video_budget,
            "layout": layout,
            "pool_pages": pages,
            "most_visual_tokens": low,
            "limited_by_max_model_len": low + 256 > longest,
        }
        if low:
            request = make(low)
            engine.plant([request])
            run = engine.run([request], limit_s=plan.cell_limit_s)
            cell["prompt_tokens"] = request.num_prompt_tokens
            cell["generated"] = run.completions[request.request_id].tokens
            cell["step_ms"] = milliseconds(step_seconds(run, 1))
        yield cell


def video(context: Context) -> Iterator[dict[str, Any]]:
    """Lone requests of very many visual tokens, computed: time to first token, speed after it."""
    engine, plan = context.engine, context.plan
    engine.set_budget(None)
    for images in plan.video_images:
        request = context.image_request(plan.video_outputs, images)
        cell = {"visual_tokens": images * context.picture.visual_tokens}
        room = engine.config.model_config.max_model_len
        if request.num_prompt_tokens + plan.video_outputs > room:
            yield {**cell, "longer_than_max_model_len": room}
            continue
        engine.forget()
        run = engine.run([request], limit_s=plan.cell_limit_s)
        steps = step_seconds(run, 1)
        times = first_tokens(run)
        yield {
            **cell,
            "timed_out": run.timed_out,
            "first_token_ms": milliseconds(times),
            "step_ms_median": round(1e3 * statistics.median(steps), 3) if steps else None,
            "step_ms": milliseconds(steps),
        }


def no_harm(context: Context) -> Iterator[dict[str, Any]]:
    """Text alone, and lone requests: what must not become worse."""
    engine, plan = context.engine, context.plan
    engine.set_budget(None)

    def batch(lengths: Sequence[tuple[int, int]]) -> tuple[float, Run]:
        engine.forget()
        run = engine.run([context.text_request(p, o) for p, o in lengths])
        return sum(o for _, o in lengths) / (run.steps[-1].time - run.start), run

    fixed = [(plan.text_prompt, plan.text_outputs)] * plan.text_requests
    for what, lengths in (("text, fixed lengths", fixed), ("text, chat lengths", _chats_of(plan))):
        rates, first = [], []
        for _ in range(plan.text_repeats):
            rate, run = batch(lengths)
            rates.append(rate)
            first.append(statistics.median(first_tokens(run)))
        yield {
            "what": what,
            "requests": len(lengths),
            "prompt_tokens": sum(p for p, _ in lengths),
            "output_tokens": sum(o for _, o in lengths),
            "output_tokens_per_s_median": round(statistics.median(rates), 1),
            "output_tokens_per_s": [round(r, 1) for r in rates],
            "first_token_ms": milliseconds(first),
        }
    for what, make in (
        ("lone image request", lambda outputs: context.image_request(outputs)),
        ("lone text request", lambda outputs: context.text_request(plan.text_prompt, outputs)),
    ):
        engine.forget()
        first = [first_tokens(engine.run([make(1)]))[0] for _ in range(plan.lone_requests + 1)][1:]
        run = engine.run([make(plan.step_outputs)])
        steps = step_seconds(run, 1)
        yield {
            "what": what,
            "first_token_ms_median": round(1e3 * statistics.median(first), 3),
            "first_token_ms": milliseconds(first),
            "step_ms_median": round(1e3 * statistics.median(steps), 4),
            "step_ms": milliseconds(steps),
        }


def _chats_of(plan: Plan) -> list[tuple[int, int]]:
    """Lengths with the long tail of shared chats: median prompt a quarter of the fixed one's."""
    draw = random.Random(1)
    most = 4 * plan.text_prompt

    def length(median: float) -> int:
        return max(4, min(round(draw.lognormvariate(0, 1) * median), most))

    return [
        (length(plan.text_prompt / 4), length(plan.text_outputs)) for _ in range(plan.text_requests)
    ]


def mix(context: Context) -> Iterator[dict[str, Any]]:
    """Prompts of equal length with ever more of them visual, planted, as many as fit."""
    engine, plan = context.engine, context.plan
    for share in plan.mix_shares:
        visual = plan.mix_tokens * share // 100 // 16 * 16

        def make(outputs: int, visual: int = visual) -> Any:
            # The image comes first, and a block of text last: what is planted must cover the image.
            text = plan.mix_tokens - visual + AFTER + max(engine.block_sizes)
            image = [(next(context.names), context.picture, visual)] if visual else []
            parts = [BEFORE, *image, text]
            return engine.request(parts, outputs, salt=next(context.names))

        yield decode_cell(context, plan.mix_budget, plan.mix_outputs, make, visual_share=share)


SCENARIOS: dict[str, Callable[[Context], Iterator[dict[str, Any]]]] = {
    "resident": resident,
    "image-chats": image_chats,
    "long-context": long_context,
    "longest-video": longest_video,
    "no-harm": no_harm,
    "mix": mix,
    "decode": decode,
    "video": video,
    "end-to-end": end_to_end,
}
"""By name, the most telling first."""


def warm_up(context: Context) -> None:
    """Let kernels compile: images and text, cold and from the prefix cache, alone and together."""
    engine = context.engine
    engine.run([context.text_request(64, WARM_TOKENS)])
    for images in (1, 2):
        salt = next(context.names)
        parts: list[Any] = [BEFORE, *((f"{salt}-{i}", context.picture) for i in range(images))]
        for extra in (AFTER, AFTER + 20):
            batch = [engine.request([*parts, extra], WARM_TOKENS, salt=salt)]
            batch += [context.text_request(200, WARM_TOKENS), context.image_request(WARM_TOKENS)]
            engine.run(batch)
    engine.forget()
