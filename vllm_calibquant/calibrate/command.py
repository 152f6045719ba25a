"""The command: from a model and prompts to a profile and a summary, interrupted or not.

In the end the choice that the search found is made anew with the moments of all prompts.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_calibquant.calibrate.moments import Moments
from vllm_calibquant.calibrate.probe import BATCH, Answer, Probe, Reference, Score
from vllm_calibquant.calibrate.prompts import SYNTHETIC, Prompt, load_prompts
from vllm_calibquant.calibrate.search import (
    Budget,
    Choice,
    Designer,
    leave_layers,
    pinned,
    plain_profile,
    search,
)
from vllm_calibquant.config import ConfigError
from vllm_calibquant.format import BLOCK_SIZE
from vllm_calibquant.output import check_output
from vllm_calibquant.profile import ModelIdentity, Profile, load_profile

FEWEST = 2
"""Prompts of a search."""

SHOWN = 3
"""Layers of which the summary says what leaving one of them at 16 bits would gain."""


@dataclass(frozen=True)
class Task:
    """What a calibration is asked for."""

    model: str
    data: str
    bits: float
    out: Path
    count: int = 360
    held_out: int = 90
    seed: int = 1
    max_tokens: int = 32
    trials: int = 64
    seconds: float | None = None
    against: Path | None = None
    llm: Mapping[str, Any] = field(default_factory=dict)


class State:
    """What an interrupted search leaves beside its output, and takes up again.

    A log with a line for the task, for each batch of answers and for every score; moments are soon
    found anew.
    """

    def __init__(self, out: Path, task: Mapping[str, Any]) -> None:
        self.log = out.with_name(out.name + ".search.jsonl")
        self.answers: list[Answer] = []
        """Of the first prompts, as many as were answered."""
        self.scores: dict[str, Score] = {}
        records = self._records()
        if records and records[0] == {"task": task}:
            for record in records[1:]:
                self._take(record)
        else:
            self.remove()
            self._write({"task": task})

    def _records(self) -> list[dict[str, Any]]:
        """What the log has; half a record at its end, of a process that was killed, is cut off."""
        if not self.log.exists():
            return []
        lines = self.log.read_bytes().splitlines(keepends=True)
        if lines and not _is_whole(lines[-1]):
            os.truncate(self.log, sum(map(len, lines[:-1])))  # the next record begins a line
            lines.pop()
        return [json.loads(line) for line in lines]

    def _take(self, record: dict[str, Any]) -> None:
        if "answers" in record:
            self.answers += [Answer(*answer) for answer in record["answers"]]
        else:
            self.scores[record["choice"]] = Score(**record["score"])

    def _write(self, record: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def keep(self, record: dict[str, Any]) -> None:
        """Note further answers or a score."""
        self._write(record)
        self._take(record)

    def remove(self) -> None:
        """Forget everything, at the end or because the task is another one."""
        self.log.unlink(missing_ok=True)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


@dataclass(frozen=True)
class Judge:
    """The divergence of choices on held-out prompts; what the log has is not computed again."""

    designer: Designer
    held: Sequence[tuple[Prompt, Answer]]
    references: Sequence[Reference]
    state: State

    @contextmanager
    def scores(self, probe: Probe, what: str, total: int) -> Iterator[Callable[[Choice], Score]]:
        """A context with the divergence of each of so many choices, under a progress bar."""
        known = self.state.scores
        with tqdm(total=total, desc=what, unit="profile") as bar:

            def score(choice: Choice) -> Score:
                if choice.key not in known:
                    found = self.of(self.designer.profile(choice), probe)
                    self.state.keep({"choice": choice.key, "score": asdict(found)})
                bar.update()
                bar.set_postfix_str(f"KL {known[choice.key].kl:.3g}")
                return known[choice.key]

            yield score
            bar.total = bar.n  # a search may end before

    def of(self, profile: Profile, probe: Probe) -> Score:
        """That of a profile."""
        return probe.score(profile, self.held, self.references)


def calibrate(task: Task) -> str:
    """Search a profile and write it; the summary for the user.

    An interrupted search leaves its log beside the output, and the same command goes on there.

    Raises
    ------
    ConfigError
        For a model, data or bits that cannot be used.
    """
    begin = time.perf_counter()
    check_output(task.out)
    prompts = load_prompts(task.data, task.count, task.seed)
    if len(prompts) < FEWEST:
        raise ConfigError(
            f"--data {task.data} with --count {task.count} has {len(prompts)} prompt, and a search "
            f"takes at least {FEWEST} prompts: one to learn from, one to judge by"
        )
    model, settings = _configure(task, prompts)
    budget = Budget.of(model.head_size, task.bits)
    same = {"out": task.out.name, "against": str(task.against), "model": asdict(model)}
    state = State(task.out, _json(asdict(task) | same))
    older = None if task.against is None else _older(task.against, model, budget)

    def in_time() -> bool:
        return task.seconds is None or time.perf_counter() < begin + task.seconds

    @contextmanager
    def start(budget: Budget) -> Iterator[Probe]:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "start.safetensors")
            plain_profile(model, budget).save(path)
            with Probe(task.model, path, task.max_tokens, settings) as probe:
                yield probe

    with start(budget) as probe:
        _answer(probe, prompts, state)
        asked = list(zip(prompts, state.answers, strict=True))
        step = max(4, len(asked) // max(task.held_out, 1))  # most prompts are for moments
        held, rest = asked[::step], [a for i, a in enumerate(asked) if i % step]
        with tqdm(total=len(asked), desc="statistics", unit="prompt") as bar:
            references, held_moments = _references(probe, held, bar)
            _, moments = _references(probe, rest, bar)
        judge = Judge(Designer(model, budget, moments), held, references, state)
        total = 1 + task.trials + len(moments)  # at most
        with judge.scores(probe, "search", total) as score:
            choice, reached, steps = search(judge.designer, score, task.trials, in_time)
            before = None if older is None else judge.of(older, probe)
            worse = before is not None and before.kl < reached.kl
            # The moments cannot say which: damage in one layer weighs more than in another.
            beyond = [
                {"layer": layer, **asdict(score(replace(choice, beyond=(layer,))))}
                for layer in moments
                if len(moments) > 1 and not worse and in_time()
            ]

    @contextmanager
    def engine(budget: Budget, total: int) -> Iterator[Callable[[Choice], Score]]:
        with (
            start(budget) as probe,
            judge.scores(probe, "layers at 16 bits", total) as score,
        ):
            yield score

    try:
        for better in leave_layers(judge.designer, choice, reached, engine, in_time):
            choice, reached, what = better
            steps.append((what, reached.kl))
    except (RuntimeError, ValueError) as error:  # another engine may find too little memory
        more = "more " if choice.exact else ""
        tqdm.write(f"{more}layers at 16 bits were not tried: {error}")
    if before is not None and before.kl < reached.kl:
        state.remove()
        return (
            f"\n{task.against} has a divergence of {before.kl:.4g} nats and nothing found here has "
            f"less than {reached.kl:.4g}: {task.out} is not written"
        )
    layers = model.num_layers
    notes = {
        "model": Path(task.model).name,
        "data": task.data if task.data == SYNTHETIC else Path(task.data).name,
        "prompts": len(prompts),
        "held_out": len(held),
        "seed": task.seed,
        "choice": asdict(choice),
        "score": asdict(reached),
        "against": before and asdict(before),
        "steps": steps,
        "one_layer_16bit": sorted(beyond, key=lambda tried: tried["kl"]),
        "bytes_with_one_layer_16bit": round(budget.pages(layers, 1) / budget.pages(layers), 3),
        "seconds": round(time.perf_counter() - begin),
    }
    every = {i: m + held_moments[i] for i, m in moments.items()}
    profile = Designer(model, budget, every).profile(pinned(choice, judge.designer), notes)
    profile.save(task.out)
    state.remove()
    return summary(profile, judge.designer.budget_of(choice), task)


def summary(profile: Profile, budget: Budget, task: Task) -> str:
    """What was found, for people."""
    notes, model, d = profile.notes, profile.model, profile.model.head_size
    score, exact = Score(**notes["score"]), profile.layers_16bit
    together = model.num_layers / budget.pages(model.num_layers, len(exact))
    lines = [
        "",
        f"{task.out}: {budget.bits:g} bit{'s' * (budget.bits != 1)} a number on average, "
        f"{budget.slots * BLOCK_SIZE} visual tokens a page ({budget.slots}x)",
        *(
            [f"and 16 bits in layer {', '.join(map(str, exact))}: together {together:.3g}x"]
            if exact
            else []
        ),
        f"for {notes['model']}: {model.model_type}, {model.num_layers} layers, "
        f"{model.num_kv_heads} KV heads of {d}",
        "",
        f"Against 16 bits, read as after a prefix hit: {notes['held_out']} of "
        f"{notes['prompts']} prompts, held out from the statistics",
        f"  divergence of the next token   {score.kl:.4f} nats",
        f"  same most likely token         {100 * score.agreement:.2f} % of positions",
        f"  same greedy answer             {100 * score.answers:.1f} % of prompts",
        *([f"  {task.against} has {notes['against']['kl']:.4f} nats"] if notes["against"] else []),
        "",
        "How the search came there:",
        *(f"  {kl:8.4f}  {step}" for step, kl in notes["steps"]),
        "",
        "Bits a number of K and of V, and components with 0, 1, 2 ... bits:",
    ]
    for i, layer in profile.layers.items():
        cells = [
            f"{sum(part.bits) / d:.2f} ({' '.join(str(part.bits.count(b)) for b in range(5))})"
            for part in (layer.key, layer.value)
        ]
        lines.append(f"  layer {i:2d}   K {cells[0]:24} V {cells[1]}")
    if notes["one_layer_16bit"]:
        lines += [
            "",
            "With one layer at 16 bits a visual token would take "
            f"{notes['bytes_with_one_layer_16bit']:.3g} times the bytes, and vLLM's pool",
            "would be split into groups. Divergence with such a setting beside the profile:",
            *(
                f'  {tried["kl"]:8.4f}  "layers_16bit": [{tried["layer"]}]'
                for tried in notes["one_layer_16bit"][:SHOWN]
            ),
        ]
    section = json.dumps({"calibquant": {"profile": str(task.out)}}, ensure_ascii=False)
    return "\n".join(
        [
            *lines,
            "",
            f"vllm serve {shlex.quote(task.model)} --kv-cache-dtype calibquant1 \\",
            f"    --additional-config {shlex.quote(section)}",
        ]
    )


def _older(path: Path, model: ModelIdentity, budget: Budget) -> Profile:
    """A profile to compare with, which must fit the engine's pages."""
    profile = load_profile(str(path))
    fits = profile.model == model and not profile.layers_16bit
    if not fits or profile.slots(torch.bfloat16) != budget.slots:
        raise ConfigError(
            f"--against {path} is a profile for a {profile.model.model_type} whose bits average "
            f"{profile.average_bits:g}; give one of this model, with {budget.bits:g} in every layer"
        )
    return profile


def _references(
    probe: Probe, asked: Sequence[tuple[Prompt, Answer]], bar: tqdm
) -> tuple[list[Reference], dict[int, Moments]]:
    found = []
    for reference in probe.references(asked):
        found.append(reference)
        bar.update()
    return found, probe.moments()


def _answer(probe: Probe, prompts: Sequence[Prompt], state: State) -> None:
    """Answers at 16 bits of the prompts that have none yet."""
    done = len(state.answers)
    with tqdm(total=len(prompts), initial=done, desc="answers at 16 bits", unit="prompt") as bar:
        for i in range(done, len(prompts), BATCH):
            found = probe.answers(prompts[i : i + BATCH])
            state.keep({"answers": found})
            bar.update(len(found))


def _configure(task: Task, prompts: Sequence[Prompt]) -> tuple[ModelIdentity, dict[str, Any]]:
    """The model's identity, and arguments of ``LLM``: prompts one at a time need little."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    images = max(len(prompt.images) for prompt in prompts)
    settings = {
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": images, "video": 0},
        **task.llm,
    }
    model = EngineArgs(task.model, **settings).create_model_config()
    length = settings.setdefault("max_model_len", min(8192, model.max_model_len))
    settings.setdefault("max_num_batched_tokens", max(8192, length))
    if current_platform.is_cpu():
        settings.setdefault("kv_cache_memory_bytes", 1 << 30)
    return ModelIdentity.of(model), settings


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))
