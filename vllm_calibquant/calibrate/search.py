"""The search: which basis, bits, ranges and calibration bring a model nearest to its 16-bit self.

Everything but a handful of numbers follows from the moments in closed form.  These numbers are a
:class:`Choice`, and coordinate descent finds them: each step tries the neighbours of one, and keeps
one that lowers the divergence of next-token distributions, until no neighbour does.  Moments fit
the prompts that they come from very well, so divergence is judged on prompts held out from them.
Where the byte budget has room for layers at 16 bits, beside fewer bits for the others, that is
tried too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from vllm_calibquant.calibrate.moments import Moments, learn_basis, place_bits
from vllm_calibquant.calibrate.probe import Score
from vllm_calibquant.config import ConfigError
from vllm_calibquant.format import MAX_SLOTS, PLANE_MULTIPLE, PageFormat
from vllm_calibquant.profile import LayerProfile, ModelIdentity, PartProfile, Profile

MAX_BITS = 4
WORTHWHILE = 0.99
"""A step is kept if it lowers the divergence at least to this share: less is noise."""
SLOWER_WORTHWHILE = 0.7
"""The same where serving gets slower for it.

To calibrate scores, kernels take a pass more; layers left at 16 bits need their own block tables.
"""

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
    key_factors: tuple[float, ...] = (0.6, 0.85, 1.0, 1.0)
    """Range factors of components of K with 1, 2, 3 and 4 bits."""
    value_factors: tuple[float, ...] = (0.6, 0.85, 1.0, 1.0)
    """The same for V."""
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


RATIOS: tuple[tuple[str, int | None, float], ...] = (
    ("damping", None, 3.0),
    ("error", None, 1.2),
    ("key_factors", 0, 1.2),
    ("value_factors", 0, 1.2),
    ("key_factors", 1, 1.15),
    ("value_factors", 1, 1.15),
)
"""Numbers, or one of several, that the search takes so many times smaller and larger."""

VALUES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("max_bits", (3, 4)),
    ("centred", (False, True)),
    ("tau_max", (0.0, 0.25, 0.5, 1.0)),
    ("tau_min", (0.0, 0.5, 1.0)),
)
"""What else it tries."""


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
        planes = 0
        if bits <= MAX_BITS:  # which is false of NaN
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
        layers = {}
        for i in self.moments:
            if i in (*choice.exact, *choice.beyond):
                continue
            split = self.split(i, choice)
            layers[i] = LayerProfile(
                self._part(i, "key", split[0], choice, choice.key_factors),
                self._part(i, "value", split[1], choice, choice.value_factors),
            )
        return Profile(self.model, layers, choice.calibration, notes or {})

    def split(self, layer: int, choice: Choice) -> Split:
        """Planes of a layer in codes."""
        return dict(choice.splits).get(layer) or self.ranking(layer, choice)[0]

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

    def _part(
        self, layer: int, name: str, planes: int, choice: Choice, factors: tuple[float, ...]
    ) -> PartProfile:
        bases, worth = self._basis(layer, name, choice)
        bits, _ = _place_pairs(worth, planes, choice)
        mean = self.moments[layer].part(name)[2].float()
        return PartProfile(
            bases.float(),
            mean if choice.centred else torch.zeros_like(mean),
            bits,
            torch.tensor([factors[b - 1] if b else 1.0 for b in bits]),
        )


def _place_pairs(worth: torch.Tensor, planes: int, choice: Choice) -> tuple[tuple[int, ...], float]:
    """:func:`place_bits` for pairs of neighbours, whose scales kernels move together."""
    errors = [choice.error**b for b in range(choice.max_bits + 1)]
    bits, damage = place_bits(worth.unflatten(0, (-1, 2)).sum(1).tolist(), planes // 2, errors)
    return tuple(b for b in bits for _ in range(2)), damage


def moves(designer: Designer) -> Iterator[Callable[[Choice], list[Choice]]]:
    """The steps of a pass of the search: each makes neighbours of what is best so far."""

    def possible(choices: list[Choice]) -> list[Choice]:
        return [c for c in choices if all(designer.ranking(i, c) for i in designer.moments)]

    for name, index, ratio in RATIOS:

        def scale(
            best: Choice, name: str = name, index: int | None = index, ratio: float = ratio
        ) -> list[Choice]:
            return possible([_scaled(best, name, index, times) for times in (1 / ratio, ratio)])

        yield scale
    for name, values in VALUES:

        def change(
            best: Choice, name: str = name, values: tuple[Any, ...] = values
        ) -> list[Choice]:
            return possible([replace(best, **{name: value}) for value in values])

        yield change
    for layer in designer.moments:

        def move(best: Choice, layer: int = layer) -> list[Choice]:
            here = designer.split(layer, best)
            others = tuple((i, s) for i, s in best.splits if i != layer)
            nearest = [s for s in designer.ranking(layer, best)[:2] if s != here]
            return [replace(best, splits=(*others, (layer, s))) for s in nearest[:1]]

        yield move


def _scaled(choice: Choice, name: str, index: int | None, times: float) -> Choice:
    """A choice with so many times a number, to three digits; range factors are at most 1."""
    old = getattr(choice, name)
    new: Any = float(f"{(old if index is None else old[index]) * times:.3g}")
    if index is not None:
        new = (*old[:index], min(new, 1.0), *old[index + 1 :])
    return replace(choice, **{name: new})


def search(
    designer: Designer,
    score: Callable[[Choice], Score],
    limit: int,
    in_time: Callable[[], bool] = lambda: True,
) -> tuple[Choice, Score, list[tuple[str, float]]]:
    """Coordinate descent, until a pass over all steps keeps none.

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
    tried = {best}
    kept = True
    while kept:
        kept = False
        for move in moves(designer):
            for option in move(best):
                if option in tried:
                    continue
                if len(tried) > limit or not in_time():
                    return best, reached, steps
                tried.add(option)
                found = score(option)
                turned_on = option.calibration and not best.calibration
                share = SLOWER_WORTHWHILE if turned_on else WORTHWHILE
                if found.kl < share * reached.kl:
                    steps.append((_difference(best, option), found.kl))
                    best, reached, kept = option, found, True
    return best, reached, steps


def leave_layers(
    designer: Designer,
    choice: Choice,
    reached: Score,
    engine: Callable[[Budget, int], AbstractContextManager[Callable[[Choice], Score]]],
    in_time: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[Choice, Score, str]]:
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

    Yields
    ------
    choice, score, step
        Where it has come to with one layer more, and that step in words.
    """
    while in_time():
        budget = designer.budget.beside(len(designer.moments), len(choice.exact) + 1)
        if budget is None:
            return
        left = [i for i in designer.moments if i not in choice.exact]
        # Splits were of another number of planes.
        options = [replace(choice, exact=(*choice.exact, i), splits=()) for i in left]
        options = [o for o in options if all(designer.ranking(i, o) for i in left)]
        with engine(budget, len(options)) as score:
            scores = [(score(option), option) for option in options if in_time()]
        if not scores:
            return
        found, option = min(scores, key=lambda scored: scored[0].kl)
        if found.kl >= SLOWER_WORTHWHILE * reached.kl:
            return
        choice, reached = option, found
        yield choice, reached, f"layer {option.exact[-1]} at 16 bits, others {budget.bits:g}"


def _difference(one: Choice, other: Choice) -> str:
    name = next(n for n in asdict(one) if getattr(one, n) != getattr(other, n))
    value = getattr(other, name)
    if name == "splits":
        layer, (k, v) = value[-1]
        return f"layer {layer} with {k} + {v} planes"
    return f"{name} {value}"


def pinned(choice: Choice, designer: Designer) -> Choice:
    """A choice with the splits that it has here, whatever other moments would predict."""
    return replace(choice, splits=tuple((i, designer.split(i, choice)) for i in designer.moments))
