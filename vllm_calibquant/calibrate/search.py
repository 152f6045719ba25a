"""The search: which basis, bits, ranges and calibration bring a model nearest to its 16-bit self.

Everything but a handful of numbers follows from the moments in closed form.  These numbers are a
:class:`Choice`, and coordinate descent finds them: each step tries the neighbours of one, and keeps
one that lowers the divergence of next-token distributions.  Moments fit the prompts that they
come from very well, so divergence is judged on prompts held out from them; in the end the choice is
made anew with the moments of all.  Where the byte budget has room for layers at 16 bits, beside
fewer bits for the others, that is tried too.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_calibquant.calibrate.moments import Moments, learn_basis, place_bits
from vllm_calibquant.calibrate.probe import BATCH, BLOCK_SIZE, Answer, Probe, Reference, Score
from vllm_calibquant.calibrate.prompts import SYNTHETIC, Prompt, load_prompts
from vllm_calibquant.config import ConfigError
from vllm_calibquant.format import MAX_SLOTS, PLANE_MULTIPLE, PageFormat
from vllm_calibquant.profile import (
    LayerProfile,
    ModelIdentity,
    PartProfile,
    Profile,
    load_profile,
)

MAX_BITS = 4
WORTHWHILE = 0.99
"""A step is kept if it lowers the divergence at least to this share: less is noise."""
CALIBRATION_WORTHWHILE = 0.9
"""The same where a step turns on the calibration of scores, for which kernels take a pass more."""
LEAVING_WORTHWHILE = 0.7
"""The same where a layer is left at 16 bits: layers of two kinds need block tables of their own."""

SHOWN = 3
"""Layers of which the summary says what leaving one of them at 16 bits would gain."""

Split = tuple[int, int]
"""Planes of K and of V in a layer, a token and KV head."""


@dataclass(frozen=True)
class Choice:
    """What is searched."""

    error: float = 0.33
    """Relative squared error that one more bit leaves of a component's."""
    damping: float = 0.3
    max_bits: int = MAX_BITS
    centred: bool = False
    """Whether the mean over calibration prompts is taken off before coding."""
    factors: tuple[float, ...] = (0.6, 0.85, 1.0, 1.0)
    """Range factors of components with 1, 2, 3 and 4 bits."""
    tau_min: float = 0.0
    tau_max: float = 0.0
    """With ``tau_min``, how far calibration moves the ends of visual scores down."""
    splits: tuple[tuple[int, Split], ...] = ()
    """Layers whose planes are not split as the moments predict."""
    exact: tuple[int, ...] = ()
    """Layers left at 16 bits, for which the others make room."""
    beyond: tuple[int, ...] = ()
    """The same beyond the byte budget: no step of the search, but what its summary speaks of."""

    @property
    def key(self) -> str:
        """Name in the log of the search."""
        return json.dumps(asdict(self))

    @property
    def calibration(self) -> tuple[float, float] | None:
        """tau_min and tau_max, or None for no calibration of scores."""
        return (self.tau_min, self.tau_max) if self.tau_min or self.tau_max else None


STEPS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("damping", (0.1, 1.0)),
    ("error", (0.28, 0.4)),
    ("max_bits", (3,)),
    ("centred", (True,)),
    ("factors", ((0.5, 0.85, 1.0, 1.0), (0.7, 0.85, 1.0, 1.0))),
    ("factors", ((0.6, 0.75, 1.0, 1.0), (0.6, 0.95, 1.0, 1.0))),
    ("tau_max", (0.25, 0.5, 1.0)),
    ("tau_min", (0.5, 1.0)),
)


@dataclass(frozen=True)
class Budget:
    """Planes of a token and KV head, and what pages make of them.

    All layers have the same: they share block ids, so that a page has as many sub-slots in each of
    them, and the page of each has the same bytes.  Planes that one layer gave away would leave
    bytes unused there and fit in no other.
    """

    head_size: int
    planes: int
    slots: int
    splits: tuple[Split, ...]

    @classmethod
    def of(cls, head_size: int, bits: float) -> Budget:
        """Splits with the most sub-slots for an average number of bits.

        Raises
        ------
        ConfigError
            If pages cannot have so many or so few planes.
        """
        planes = int(2 * head_size * bits / PLANE_MULTIPLE + 1e-6) * PLANE_MULTIPLE
        most = MAX_BITS * head_size // PLANE_MULTIPLE * PLANE_MULTIPLE
        found = {}
        for k in range(PLANE_MULTIPLE, planes, PLANE_MULTIPLE):
            if k <= most and planes - k <= most:
                found[k, planes - k] = _format(head_size, (k, planes - k)).slots
        if not found:
            raise ConfigError(
                f"--bits {bits:g} is not possible with a head size of {head_size}; give a number "
                f"from {PLANE_MULTIPLE / head_size:g} to {MAX_BITS}"
            )
        slots = max(found.values())
        fits = {s for s in found if _format(head_size, s, slots).slots == slots}
        return cls(head_size, planes, slots, tuple(sorted(fits)))

    @property
    def bits(self) -> float:
        """Average bits that there really are."""
        return self.planes / (2 * self.head_size)

    def pages(self, layers: int, exact: int = 0) -> float:
        """Pages of one layer that 16 visual tokens take, with some of so many layers at 16 bits."""
        return (layers - exact) / self.slots + exact

    def beside(self, layers: int, exact: int) -> Budget | None:
        """The most planes that take no more bytes with some layers at 16 bits, if any are left."""
        return _beside(self, layers, exact)


@lru_cache
def _beside(budget: Budget, layers: int, exact: int) -> Budget | None:
    if not 0 <= exact < layers:
        return None
    for planes in range(budget.planes, PLANE_MULTIPLE, -PLANE_MULTIPLE):
        other = Budget.of(budget.head_size, planes / (2 * budget.head_size))
        if other.pages(layers, exact) <= budget.pages(layers):
            return other
    return None


def _even(head_size: int, planes: int) -> tuple[int, ...]:
    return tuple(planes // head_size + (j < planes % head_size) for j in range(head_size))


def _format(head_size: int, split: Split, max_slots: int = MAX_SLOTS) -> PageFormat:
    key_bits, value_bits = (_even(head_size, planes) for planes in split)
    return PageFormat(head_size, key_bits, value_bits, max_slots=max_slots)


def plain_profile(model: ModelIdentity, budget: Budget) -> Profile:
    """A profile to start an engine with: no basis at all, the budget's page geometry."""
    split = min(budget.splits, key=lambda s: abs(s[0] - s[1]))
    heads, d = model.num_kv_heads, model.head_size

    def part(planes: int) -> PartProfile:
        return PartProfile(
            torch.eye(d).expand(heads, d, d),
            torch.zeros(heads, d),
            _even(d, planes),
            torch.full((d,), 0.6),
        )

    layer = LayerProfile(part(split[0]), part(split[1]))
    return Profile(model, dict.fromkeys(range(model.num_layers), layer))


class Designer:
    """From moments and a choice to a profile."""

    def __init__(self, model: ModelIdentity, budget: Budget, moments: Mapping[int, Moments]):
        self.model, self.budget, self.moments = model, budget, moments
        self._bases: dict[tuple[int, str, float], tuple[torch.Tensor, torch.Tensor]] = {}

    def budget_of(self, choice: Choice) -> Budget:
        """Planes of the layers that are in codes."""
        budget = self.budget.beside(len(self.moments), len(choice.exact))
        assert budget is not None
        return budget

    def profile(self, choice: Choice, notes: Mapping[str, Any] | None = None) -> Profile:
        """The profile of a choice."""
        moved = dict(choice.splits)
        layers = {}
        for i in self.moments:
            if i in (*choice.exact, *choice.beyond):
                continue
            split = moved.get(i) or self.ranking(i, choice)[0]
            parts = (
                self._part(i, n, p, choice) for n, p in zip(("key", "value"), split, strict=True)
            )
            layers[i] = LayerProfile(*parts)
        return Profile(self.model, layers, choice.calibration, notes or {})

    def ranking(self, layer: int, choice: Choice) -> list[Split]:
        """Splits of a layer by the damage that the moments predict, least first."""

        def damage(split: Split) -> float:
            return sum(
                _place_pairs(self._basis(layer, n, choice)[1], p, choice)[1]
                for n, p in zip(("key", "value"), split, strict=True)
            )

        splits, most = self.budget_of(choice).splits, choice.max_bits * self.model.head_size
        return sorted((s for s in splits if max(s) <= most), key=damage)

    def _basis(self, layer: int, name: str, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        key = (layer, name, choice.damping)
        if key not in self._bases:
            metric, covariance, _ = self.moments[layer].part(name)
            found = [
                learn_basis(a, c, choice.damping) for a, c in zip(metric, covariance, strict=True)
            ]
            bases, worth = zip(*found, strict=True)
            # Heads share one list of bits: component by component, what all of them would lose.
            self._bases[key] = torch.stack(bases), torch.stack(worth).sum(0)
        return self._bases[key]

    def _part(self, layer: int, name: str, planes: int, choice: Choice) -> PartProfile:
        bases, worth = self._basis(layer, name, choice)
        bits, _ = _place_pairs(worth, planes, choice)
        mean = self.moments[layer].part(name)[2].float()
        return PartProfile(
            bases.float(),
            mean if choice.centred else torch.zeros_like(mean),
            bits,
            torch.tensor([choice.factors[b - 1] if b else 1.0 for b in bits]),
        )


def _place_pairs(worth: torch.Tensor, planes: int, choice: Choice) -> tuple[tuple[int, ...], float]:
    """:func:`place_bits` for pairs of neighbours, whose scales kernels move together."""
    errors = [choice.error**b for b in range(choice.max_bits + 1)]
    bits, damage = place_bits(worth.unflatten(0, (-1, 2)).sum(1).tolist(), planes // 2, errors)
    return tuple(b for b in bits for _ in range(2)), damage


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


def moves(designer: Designer) -> Iterator[Callable[[Choice], list[Choice]]]:
    """The steps of the search: each makes alternatives to what is best so far."""
    for name, values in STEPS:

        def change(
            best: Choice, name: str = name, values: tuple[Any, ...] = values
        ) -> list[Choice]:
            new = [replace(best, **{name: v}) for v in values if v != getattr(best, name)]
            return [c for c in new if all(designer.ranking(i, c) for i in designer.moments)]

        yield change
    for layer in designer.moments:

        def move(best: Choice, layer: int = layer) -> list[Choice]:
            second = designer.ranking(layer, best)[1:2]
            return [replace(best, splits=(*best.splits, (layer, s))) for s in second]

        yield move


def search(
    designer: Designer,
    score: Callable[[Choice], Score],
    limit: int,
    in_time: Callable[[], bool] = lambda: True,
) -> tuple[Choice, Score, list[tuple[str, float]]]:
    """Coordinate descent.

    Parameters
    ----------
    designer
        Knows layers and splits.
    score
        Divergence of a choice.
    limit
        Choices to try at most, after the first.
    in_time
        Asked before each of them whether it may be tried.

    Returns
    -------
    choice, score
        The best, and what it reached.
    steps : list of (str, float)
        What was kept on the way, and the divergence that it had.
    """
    best = Choice()
    reached = score(best)
    steps = [("closed form", reached.kl)]
    for move in moves(designer):
        for option in move(best):
            if limit <= 0 or not in_time():
                return best, reached, steps
            limit -= 1
            found = score(option)
            turned_on = option.calibration and not best.calibration
            share = CALIBRATION_WORTHWHILE if turned_on else WORTHWHILE
            if found.kl < share * reached.kl:
                steps.append((_difference(best, option), found.kl))
                best, reached = option, found
    return best, reached, steps


def leave_layers(
    designer: Designer,
    choice: Choice,
    reached: Score,
    engine: Callable[[Budget, int], AbstractContextManager[Callable[[Choice], Score]]],
    in_time: Callable[[], bool] = lambda: True,
) -> tuple[Choice, Score, list[tuple[str, float]]]:
    """Leave layers at 16 bits, one after the other, as long as that fits the budget and helps.

    Parameters
    ----------
    designer, choice, reached
        Where the search has come to.
    engine
        From the budget of the other layers, which says how many tokens a page has, and how many
        choices there are, to a context with the divergence of each.
    in_time
        Asked before each engine and each choice.

    Returns
    -------
    choice, score, steps
        As of :func:`search`; there may be no steps.
    """
    steps: list[tuple[str, float]] = []
    while in_time():
        budget = designer.budget.beside(len(designer.moments), len(choice.exact) + 1)
        if budget is None:
            break
        left = [i for i in designer.moments if i not in choice.exact]
        # Splits were of another number of planes.
        options = [replace(choice, exact=(*choice.exact, i), splits=()) for i in left]
        options = [o for o in options if all(designer.ranking(i, o) for i in left)]
        with engine(budget, len(options)) as score:
            scores = [(score(option), option) for option in options if in_time()]
        if not scores:
            break
        found, option = min(scores, key=lambda scored: scored[0].kl)
        if found.kl >= LEAVING_WORTHWHILE * reached.kl:
            break
        steps.append((f"layer {option.exact[-1]} at 16 bits, others {budget.bits:g}", found.kl))
        choice, reached = option, found
    return choice, reached, steps


def _difference(one: Choice, other: Choice) -> str:
    name = next(n for n in asdict(one) if getattr(one, n) != getattr(other, n))
    value = getattr(other, name)
    if name == "splits":
        layer, (k, v) = value[-1]
        return f"layer {layer} with {k} + {v} planes"
    return f"{name} {value}"


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
    trials: int = 48
    seconds: float | None = None
    against: Path | None = None
    llm: Mapping[str, Any] = field(default_factory=dict)


def calibrate(task: Task) -> str:
    """Search a profile and write it; the summary for the user.

    An interrupted search leaves its log beside the output, and the same command goes on there.

    Raises
    ------
    ConfigError
        For a model, data or bits that cannot be used.
    """
    begin = time.perf_counter()
    if not task.out.parent.is_dir():
        raise ConfigError(f"--out {task.out}: there is no directory {task.out.parent}")
    prompts = load_prompts(task.data, task.count, task.seed)
    model, settings = _configure(task, prompts)
    budget = Budget.of(model.head_size, task.bits)
    same = {"out": task.out.name, "against": str(task.against), "model": asdict(model)}
    state = State(task.out, _json(asdict(task) | same))
    older = None if task.against is None else _older(task.against, model, budget)

    def in_time() -> bool:
        return task.seconds is None or time.perf_counter() < begin + task.seconds

    with tempfile.TemporaryDirectory() as directory:

        def start(budget: Budget) -> Probe:
            path = Path(directory, f"{budget.slots}.safetensors")
            plain_profile(model, budget).save(path)
            return Probe(task.model, path, task.max_tokens, settings)

        with start(budget) as probe:
            _answer(probe, prompts, state)
            asked = list(zip(prompts, state.answers, strict=True))
            step = max(4, len(asked) // max(task.held_out, 1))  # most prompts are for moments
            held, rest = asked[::step], [a for i, a in enumerate(asked) if i % step]
            with tqdm(total=len(asked), desc="statistics", unit="prompt") as bar:
                references, held_moments = _references(probe, held, bar)
                _, moments = _references(probe, rest, bar)
            designer = Designer(model, budget, moments)

            def scores(probe: Probe, bar: tqdm) -> Callable[[Choice], Score]:
                def score(choice: Choice) -> Score:
                    if choice.key not in state.scores:
                        found = probe.score(designer.profile(choice), held, references)
                        state.keep({"choice": choice.key, "score": asdict(found)})
                    bar.update()
                    bar.set_postfix_str(f"KL {state.scores[choice.key].kl:.3g}")
                    return state.scores[choice.key]

                return score

            total = min(task.trials, _most_trials(designer)) + 1 + len(designer.moments)
            with tqdm(total=total, desc="search", unit="profile") as bar:
                score = scores(probe, bar)
                choice, reached, steps = search(designer, score, task.trials, in_time)
                before = None if older is None else probe.score(older, held, references)
                worse = before is not None and before.kl < reached.kl
                # The moments cannot say which: damage in one layer weighs more than in another.
                beyond = [
                    {"layer": layer, **asdict(score(replace(choice, beyond=(layer,))))}
                    for layer in moments
                    if len(moments) > 1 and not worse and in_time()
                ]

        @contextmanager
        def engine(budget: Budget, total: int) -> Iterator[Callable[[Choice], Score]]:
            bar = tqdm(total=total, desc="layers at 16 bits", unit="profile")
            with start(budget) as probe, bar:
                yield scores(probe, bar)

        choice, reached, more = leave_layers(designer, choice, reached, engine, in_time)
    if before is not None and before.kl < reached.kl:
        state.remove()
        return (
            f"\n{task.against} has a divergence of {before.kl:.4g} nats and nothing found here has "
            f"less than {reached.kl:.4g}: {task.out} is not written"
        )
    notes = {
        "model": Path(task.model).name,
        "data": task.data if task.data == SYNTHETIC else Path(task.data).name,
        "prompts": len(prompts),
        "held_out": len(held),
        "seed": task.seed,
        "choice": asdict(choice),
        "score": asdict(reached),
        "against": before and asdict(before),
        "steps": [*steps, *more],
        "one_layer_16bit": sorted(beyond, key=lambda tried: tried["kl"]),
        "bytes_with_one_layer_16bit": round(
            budget.pages(model.num_layers, 1) / budget.pages(model.num_layers), 3
        ),
        "seconds": round(time.perf_counter() - begin),
    }
    every = {i: m + held_moments[i] for i, m in moments.items()}
    profile = Designer(model, budget, every).profile(_pinned(choice, designer), notes)
    profile.save(task.out)
    state.remove()
    return summary(profile, designer.budget_of(choice), task)


def summary(profile: Profile, budget: Budget, task: Task) -> str:
    """What was found, for people."""
    notes, model, d = profile.notes, profile.model, profile.model.head_size
    score, exact = Score(**notes["score"]), profile.layers_16bit
    together = model.num_layers / budget.pages(model.num_layers, len(exact))
    lines = [
        "",
        f"{task.out}: {budget.bits:g} bits a number on average, "
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
    section = json.dumps({"calibquant": {"profile": str(task.out)}})
    return "\n".join(
        [
            *lines,
            "",
            f"vllm serve {task.model} --kv-cache-dtype calibquant1 \\",
            f"    --additional-config '{section}'",
        ]
    )


def _older(path: Path, model: ModelIdentity, budget: Budget) -> Profile:
    """A profile to compare with, which must fit the engine's pages."""
    profile = load_profile(str(path))
    fits = profile.model == model and not profile.layers_16bit
    if not fits or profile.slots(torch.bfloat16) != budget.slots:
        raise ConfigError(
            f"--against {path} is a profile of {profile.average_bits:g} bits for a "
            f"{profile.model.model_type}; give one of this model, of {budget.bits:g} bits in every "
            "layer"
        )
    return profile


def _pinned(choice: Choice, designer: Designer) -> Choice:
    """A choice with the splits that it has here, whatever other moments would predict."""
    moved = dict(choice.splits)
    here = ((i, moved.get(i) or designer.ranking(i, choice)[0]) for i in designer.moments)
    return replace(choice, splits=tuple(here))


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


def _most_trials(designer: Designer) -> int:
    return sum(len(values) for _, values in STEPS) + len(designer.moments)


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
