"""Calibration: prompts, moments and bases against loops, the search, and a real vLLM."""

import itertools
import json
import math
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.reference.checkpoints import make_checkpoint, make_image
from tests.tinyvlm.unpack import model_path
from vllm_calibquant.attention.basis import PartBasis
from vllm_calibquant.calibrate.command import State
from vllm_calibquant.calibrate.moments import Moments, learn_basis, place_bits
from vllm_calibquant.calibrate.probe import Answer, Probe, Reference, Score, divergence
from vllm_calibquant.calibrate.prompts import load_prompts
from vllm_calibquant.calibrate.search import (
    Budget,
    Choice,
    Designer,
    leave_layers,
    plain_profile,
    search,
)
from vllm_calibquant.cli import main
from vllm_calibquant.config import ConfigError
from vllm_calibquant.profile import ModelIdentity, PartProfile, load_profile

MODEL = ModelIdentity("llava", 3, 2, 64, 128, "0")

# Prompts.


def test_synthetic_prompts_are_reproducible() -> None:
    one, other = (load_prompts("synthetic", 12, seed) for seed in (1, 2))
    again = load_prompts("synthetic", 12, 1)
    assert [p.question for p in one] == [p.question for p in again]
    assert all(
        a.images[0].tobytes() == b.images[0].tobytes() for a, b in zip(one, again, strict=True)
    )
    assert len({p.images[0].tobytes() for p in [*one, *other]}) == 24
    assert len({p.question for p in one}) > 4
    assert all(len(set(p.images[0].convert("L").tobytes())) > 1 for p in one)


def test_prompts_of_a_directory(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("L", (8, 8), ord(name)).save(tmp_path / f"{name}.png")
    lines = [{"image": "a.png", "question": f"q{i}", "task": "x"} for i in range(9)]
    lines.append({"image": ["a.png", "b.png"], "question": "both"})
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "prompts.jsonl").write_text(text + "\n\n", encoding="utf-8")
    assert [p.question for p in load_prompts(str(tmp_path), 5, 1)] == ["q0", "q2", "q4", "q6", "q8"]
    found = load_prompts(str(tmp_path / "prompts.jsonl"), 50, 1)
    assert len(found) == 10
    assert [i.getpixel((0, 0)) for i in found[-1].images] == [(97,) * 3, (98,) * 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no"),
        ("\n", "has no line"),
        ('{"image": []}', "line 1: KeyError 'question'"),
        ('{"image": "a.png", "question": "?"}', "line 1: FileNotFoundError"),
        ("not json", "line 1: JSONDecodeError"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "prompts.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_prompts(str(tmp_path), 5, 1)


# Moments, bases, bits.


def test_moments_are_sums_over_queries_and_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    n, t, d, scale = 13, 3, 8, 0.3
    pages = torch.tensor([-1, 4, 4, 4, 9, 9, -1, 4, 9, -1, -1, -1, -1])
    query = torch.randn(t, 4, d, generator=generator)
    key, value = (torch.randn(n, 2, d, generator=generator) for _ in range(2))
    weight = torch.randn(4, 5, d, generator=generator)
    moments = Moments.zeros(2, d, torch.device("cpu"))
    visual = (pages >= 0).nonzero().flatten()
    numbers = pages[visual] // 5  # 4 and 9
    moments.add(query, key, value, visual, numbers, weight.mT @ weight, scale)
    for h in range(2):
        a_key, c_key, a_value, c_value = (torch.zeros(d, d, dtype=torch.float64) for _ in range(4))
        total_w = total_p = 0.0
        for i, g in itertools.product(range(t), (2 * h, 2 * h + 1)):
            seen = n - t + i + 1
            q, wo = query[i, g].double(), weight[g].double()
            p = (key[:seen, h].double() @ q * scale).softmax(0)
            out = p @ value[:seen, h].double()
            for token in (pages >= 0).nonzero().flatten().tolist():
                k, v = key[token, h].double(), value[token, h].double()
                same = pages == pages[token]
                k_off, v_off = (
                    k - key[same, h].double().mean(0),
                    v - value[same, h].double().mean(0),
                )
                w = p[token] ** 2 * (wo @ (v - out)).square().sum() * scale**2
                a_key += w * torch.outer(q, q)
                c_key += w * torch.outer(k_off, k_off)
                a_value += p[token] ** 2 * wo.T @ wo
                c_value += p[token] ** 2 * torch.outer(v_off, v_off)
                total_w, total_p = total_w + w, total_p + p[token] ** 2
        for name, a, c, total in (
            ("key", a_key, c_key, total_w),
            ("value", a_value, c_value, total_p),
        ):
            metric, covariance, mean = moments.part(name)
            torch.testing.assert_close(metric[h], a, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(covariance[h], c / total, rtol=1e-4, atol=1e-5)
            x = (key if name == "key" else value)[pages >= 0, h].double()
            torch.testing.assert_close(mean[h], x.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", [False, True])
def test_small_matrices_take_one_thread(monkeypatch, bound: bool):
    """In a container with few of a machine's cores, more of them would take minutes.

    A CPU worker of vLLM has bound its threads, and says so to who would change their number.
    """
    threads, used = 3, []

    def use(number: int) -> None:
        nonlocal threads
        threads = number

    def count(original):
        def counted(x):
            used.append(threads)
            return original(x)

        return counted

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", use)
    monkeypatch.setattr(torch._C, "set_num_threads", None if bound else use)
    for name in ("eigh", "inv"):
        monkeypatch.setattr(torch.linalg, name, count(getattr(torch.linalg, name)))
    eye = torch.eye(4, dtype=torch.float64)
    basis, _ = learn_basis(eye, eye, 0.1)
    part = PartProfile(basis[None].float(), torch.zeros(1, 4), (1,) * 4, torch.ones(4))
    PartBasis.of(part, slice(None), torch.bfloat16, "cpu")
    assert (used, threads) == ([3] * 3 if bound else [1] * 3, 3)


def test_a_basis_makes_damage_a_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    roots = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    metric, covariance = roots @ roots.mT
    basis, worth = learn_basis(metric, covariance, 0.0)
    torch.testing.assert_close(basis.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert (worth.diff() <= 0).all()
    # Components are uncorrelated, and losing one costs its worth.
    inside = basis @ covariance @ basis.T
    torch.testing.assert_close(inside, inside.diag().diag(), rtol=0, atol=1e-9)
    inverse = torch.linalg.inv(basis)
    for j in range(6):
        error = inverse[:, j]
        damage = inside[j, j] * error @ metric @ error
        torch.testing.assert_close(damage, worth[j])
    # A basis of something that is never looked at, or never differs, is still one.
    for a, c in ((metric * 0, covariance), (metric, covariance * 0)):
        basis, _ = learn_basis(a, c, 0.3)
        assert torch.linalg.inv(basis).isfinite().all()


def test_bits_go_where_they_help_most() -> None:
    worth, error = [9.0, 4.0, 1.0, 0.5], [1.0, 0.3, 0.1, 0.04]
    for planes in range(13):
        bits, damage = place_bits(worth, planes, error)
        assert sum(bits) == planes
        options = (b for b in itertools.product(range(4), repeat=4) if sum(b) == planes)
        best = min(sum(w * error[b] for w, b in zip(worth, o, strict=True)) for o in options)
        assert damage == pytest.approx(best)
    assert place_bits(worth, 99, error)[0] == (3, 3, 3, 3)


def test_divergence_is_exact_or_less() -> None:
    generator = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 4, 50, generator=generator).log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1).double()
    for count in (50, 20, 3):
        best = p.topk(count)
        found = divergence(Reference(best.indices, best.values), q)
        assert (found <= whole + 1e-6).all()
        if count == 50:
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
        assert divergence(Reference(best.indices, best.values), p).max() < 1e-5


# The search.


@pytest.mark.parametrize(
    ("head_size", "bits", "planes", "slots", "splits"),
    [
        (64, 1.0, 128, 14, {(32, 96), (64, 64), (96, 32)}),
        (64, 1.25, 160, 10, {(32, 128), (64, 96), (96, 64), (128, 32)}),
        (64, 1.5, 192, 9, {(64, 128), (128, 64)}),
        (128, 1.0, 256, 14, {(k, 256 - k) for k in range(32, 256, 32)}),
        (128, 1.25, 320, 11, {(64, 256), (128, 192), (192, 128), (256, 64)}),
        (128, 4.0, 1024, 3, {(512, 512)}),
    ],
)
def test_budgets(head_size, bits, planes, slots, splits) -> None:
    found = Budget.of(head_size, bits)
    assert (found.planes, found.slots, set(found.splits)) == (planes, slots, splits)
    assert found.bits == bits
    profile = plain_profile(replace(MODEL, head_size=head_size), found)
    assert profile.slots(torch.bfloat16) == slots
    assert profile.average_bits == bits


@pytest.mark.parametrize("bits", [0.3, 4.5, float("nan"), float("inf")])
def test_impossible_budgets_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match=f"--bits {bits} is not possible with a head size of 64"):
        Budget.of(64, bits)


@pytest.fixture
def designer() -> Designer:
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for i in range(3):
        moments = Moments.zeros(2, 64, torch.device("cpu"))
        for name in ("query", "key", "output", "value"):
            root = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
            root *= torch.logspace(0, -2, 64)  # components of very different worth
            getattr(moments, name).copy_(root @ root.mT)
        moments.key *= 10.0**i  # keys matter ever more
        moments.weights += 1
        layers[i] = moments
    return Designer(MODEL, Budget.of(64, 1.25), layers)


def test_profiles_of_choices(designer: Designer) -> None:
    profile = designer.profile(Choice())
    assert profile.slots(torch.bfloat16) == 10
    keys = [sum(layer.key.bits) for layer in profile.layers.values()]
    assert keys == sorted(keys)
    assert keys[0] < keys[-1]
    for layer in profile.layers.values():
        assert layer.planes == 160
        for part in (layer.key, layer.value):
            assert list(part.bits) == sorted(part.bits, reverse=True)
            assert part.bits[::2] == part.bits[1::2]
            assert not part.mean.any()
    moved = designer.profile(replace(Choice(), splits=((1, (32, 128)),), tau_max=0.5, max_bits=3))
    assert sum(moved.layers[1].key.bits) == 32
    assert moved.calibration == (0.0, 0.5)
    assert max(moved.layers[0].key.bits) == 3
    lifted = designer.profile(replace(Choice(), beyond=(1,), tau_min=0.25))
    assert lifted.layers_16bit == (1,)
    assert lifted.calibration == (0.25, 0.0)
    assert lifted.slots(torch.bfloat16) == 10


def test_pages_with_layers_at_16_bits() -> None:
    """A text page holds 16 tokens, a visual one 16 for each sub-slot."""
    for head_size, bits, layers, exact in ((64, 1.25, 6, 1), (128, 1.0, 28, 0), (128, 2, 28, 3)):
        budget = Budget.of(head_size, bits)
        bytes_a_token = (layers - exact) / (16 * budget.slots) + exact / 16
        assert budget.pages(layers, exact) == pytest.approx(16 * bytes_a_token)


@pytest.mark.parametrize(
    ("head_size", "bits", "layers", "exact", "others"),
    [
        (128, 1.0, 28, 0, 1.0),
        (128, 1.0, 28, 1, None),
        (128, 1.5, 28, 1, 1.0),  # 27 / 14 + 1 = 2.93 of 28 / 9 = 3.11 pages
        (128, 1.5, 28, 2, None),
        (128, 2.0, 28, 2, 1.0),
        (64, 4.0, 6, 1, 2.5),  # 5 / 5 + 1 of 6 / 3
        (64, 4.0, 6, 2, None),
        (64, 4.0, 3, 3, None),
    ],
)
def test_what_is_left_beside_layers_at_16_bits(head_size, bits, layers, exact, others) -> None:
    budget = Budget.of(head_size, bits)
    found = budget.beside(layers, exact)
    assert (found and found.bits) == others
    if found is None:
        return
    assert found.pages(layers, exact) <= budget.pages(layers)
    more = Budget.of(head_size, found.bits + 32 / (2 * head_size))
    assert exact == 0 or more.pages(layers, exact) > budget.pages(layers)


@pytest.mark.parametrize(
    ("gains", "left"),
    [
        ({4: 0.1, 1: 0.6}, (1,)),
        ({0: 0.2, 3: 0.29}, ()),  # not worth a second kind of page
        ({}, ()),
        ({2: 0.5, 4: 0.45}, (2, 4)),
    ],
)
def test_layers_are_left_at_16_bits_while_that_helps(gains, left) -> None:
    moments = {i: Moments.zeros(1, 64, torch.device("cpu")) for i in range(8)}
    for some in moments.values():
        some.weights += 1
        for name in ("query", "key", "output", "value"):
            getattr(some, name).copy_(torch.eye(64, dtype=torch.float64))
    model = replace(MODEL, num_layers=8, num_kv_heads=1)
    designer = Designer(model, Budget.of(64, 4.0), moments)
    first = replace(Choice(), tau_min=0.5, splits=((1, (192, 320)),))
    budgets: list[Budget] = []

    @contextmanager
    def engine(budget: Budget, count: int):
        assert count == 8 - len(budgets)

        def score(choice: Choice) -> Score:
            profile = designer.profile(choice)
            assert profile.slots(torch.bfloat16) == budget.slots
            assert (profile.layers_16bit, choice.splits) == (tuple(sorted(choice.exact)), ())
            return Score(1 - sum(gains.get(i, 0) for i in choice.exact), 1.0, 1.0)

        budgets.append(budget)
        yield score

    start = Score(1.0, 1.0, 1.0)
    steps = [*leave_layers(designer, first, start, engine)]
    choice, reached, _ = steps[-1] if steps else (first, start, "")
    assert choice == (replace(first, exact=left, splits=()) if left else first)
    assert reached.kl == pytest.approx(1 - sum(gains[i] for i in left))
    # 8 / 3 pages: of them 1 and 2 at 16 bits leave 1.67 for 7 and 0.67 for 6 layers.
    assert [budget.slots for budget in budgets] == [5, 9][: len(left) + 1]
    assert [s.split(",")[0] for *_, s in steps] == [f"layer {i} at 16 bits" for i in left]
    assert [*leave_layers(designer, first, start, engine, lambda: False)] == []

    @contextmanager
    def only_one_engine(budget: Budget, count: int):
        if count < 8:
            raise RuntimeError("too little memory")
        yield lambda choice: Score(0.5, 1.0, 1.0)

    found = leave_layers(designer, first, start, only_one_engine)
    assert next(found)[0].exact == (0,)  # which the caller has, whatever comes then
    with pytest.raises(RuntimeError, match="too little memory"):
        next(found)


def test_search_keeps_what_helps(designer: Designer) -> None:
    tried = []

    def score(choice: Choice) -> Score:
        tried.append(choice)
        kl = 1.0 - 0.3 * (choice.damping == 0.9) - 0.25 * (choice.tau_max == 0.5)
        kl -= 0.1 * any(layer == 2 for layer, _ in choice.splits)
        kl -= 0.001 * choice.centred  # noise
        kl -= 0.05 * (choice.tau_max == 0.25) + 0.05 * (choice.tau_min == 0.5)
        return Score(kl, 1.0, 1.0)

    choice, reached, steps = search(designer, score, 99)
    second = designer.ranking(2, choice)[1]
    assert choice == replace(Choice(), damping=0.9, tau_min=0.5, tau_max=0.5, splits=((2, second),))
    assert reached.kl == pytest.approx(0.3)
    names = [
        "closed form",
        "damping 0.9",
        "tau_max 0.5",  # 0.25 is not worth the pass that calibration takes, tau_min then is
        "tau_min 0.5",
        f"layer 2 with {second[0]} + {second[1]} planes",
    ]
    assert [step for step, _ in steps] == names
    assert len(tried) == len(set(tried))
    for few in (
        lambda: search(designer, score, 2),
        lambda: search(designer, score, 99, lambda: len(tried) < 3),
    ):
        tried.clear()
        assert few()[0].damping == 0.9
        assert len(tried) == 3


def test_search_goes_on_until_no_neighbour_is_better(designer: Designer) -> None:
    best = replace(
        Choice(), damping=2.7, key_factors=(1.0, 0.739, 1.0, 1.0), value_factors=(0.5, 0.85, 1, 1)
    )

    def score(choice: Choice) -> Score:
        pairs = [(choice.damping, best.damping)]
        pairs += zip(choice.key_factors, best.key_factors, strict=True)
        pairs += zip(choice.value_factors, best.value_factors, strict=True)
        kl = sum(math.log(x / y) ** 2 for x, y in pairs)
        # This helps only where all else is right.
        return Score(0.1 + kl - 0.05 * (kl == 0 and choice.max_bits == 3), 1.0, 1.0)

    choice, reached, steps = search(designer, score, 999)
    assert choice == replace(best, max_bits=3)
    assert reached.kl == pytest.approx(0.05)
    names = [step for step, _ in steps]
    assert names[-1] == "max_bits 3"
    assert [n for n in names if n.startswith("damping")] == ["damping 0.9", "damping 2.7"]


def test_a_search_goes_on(tmp_path: Path) -> None:
    out, task = tmp_path / "p", {"bits": 1.0}
    state = State(out, task)
    assert (state.answers, state.scores) == ([], {})
    state.keep({"answers": [["a", 300], ["b", 310]]})
    state.keep({"answers": [["c", 300]]})
    state.keep({"choice": Choice().key, "score": asdict(Score(0.5, 0.9, 0.8))})
    again = State(out, task)
    assert again.answers == [Answer("a", 300), Answer("b", 310), Answer("c", 300)]
    assert again.scores == {Choice().key: Score(0.5, 0.9, 0.8)}
    assert State(out, {"bits": 2.0}).answers == []  # another task begins anew
    State(out, task).remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_record_cut_short_is_written_again(tmp_path: Path, cut: int) -> None:
    """Whatever a kill leaves of the last line: even all of it but the line feed."""
    out, task, choices = tmp_path / "p", {"bits": 1.0}, [Choice(), Choice(tau_max=0.5)]
    scores = {choice.key: Score(0.5, 0.9, 0.8) for choice in choices}
    state = State(out, task)
    for key, score in scores.items():
        state.keep({"choice": key, "score": asdict(score)})
    state.log.write_bytes(state.log.read_bytes()[:-cut])
    again = State(out, task)
    assert list(again.scores) == [choices[0].key]
    again.keep({"choice": choices[1].key, "score": asdict(scores[choices[1].key])})
    assert State(out, task).scores == scores
    lines = again.log.read_text().splitlines()
    again.log.write_text("\n".join([lines[0], lines[1][:-cut], lines[2], ""]))
    with pytest.raises(json.JSONDecodeError):  # in the middle it is no kill
        State(out, task)
    again.log.write_text(lines[0][:-cut])
    assert State(out, task).scores == {}


# A real vLLM.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    with (directory / "prompts.jsonl").open("w", encoding="utf-8") as lines:
        for i in range(3):
            make_image(448, 448, seed=i).save(directory / f"{i}.png")
            lines.write(json.dumps({"image": f"{i}.png", "question": f"Question {i}?"}) + "\n")
    return directory


def test_command(checkpoint: Path, data: Path, tmp_path: Path, capsys) -> None:
    """From the command to an engine that answers as the search has seen it answer."""
    from vllm import SamplingParams

    from tests.serving.engine import Answer as Served
    from tests.serving.engine import Engine

    out = tmp_path / "profile.safetensors"
    llm = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}
    command = ["calibrate", str(checkpoint), "--data", str(data), "--bits", "1.25"]
    command += ["--max-tokens", "5", "--llm", json.dumps(llm)]
    main([*command, "--trials", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert "1.25 bits a number on average, 160 visual tokens a page (10x)" in said
    assert "--kv-cache-dtype calibquant1" in said
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    profile = load_profile(out)
    assert profile.average_bits == 1.25
    assert (profile.notes["prompts"], profile.notes["held_out"]) == (3, 1)
    assert profile.notes["score"]["kl"] > 1e-3  # random weights do not forgive
    exact = profile.notes["one_layer_16bit"]
    assert sorted(tried["layer"] for tried in exact) == [0, 1, 2]
    assert exact[0]["kl"] < exact[-1]["kl"]
    assert exact[0]["kl"] < profile.notes["score"]["kl"]
    assert f'"layers_16bit": [{exact[0]["layer"]}]' in said
    assert "would take 4 times the bytes" in said

    # Without the held-out prompt's moments nothing is as good as with them.
    main([*command, "--seconds", "0", "--out", str(tmp_path / "new"), "--against", str(out)])
    assert "and nothing found here has less than" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == [out.name]

    # What the probe calls "as after a prefix hit" is what a prefix hit gives.
    prompts = load_prompts(str(data), 3, 1)
    with Probe(str(checkpoint), out, 5, llm) as probe:
        messages = [{"role": "user", "content": [
            {"type": "image_pil", "image_pil": prompts[0].images[0]},
            {"type": "text", "text": "Question 0?"},
        ]}]  # fmt: skip
        tokens = [answer.prompt_tokens for answer in probe.answers(prompts)]
        asked = [
            (p, Answer(a, n)) for p, a, n in zip(prompts, ("", "One", ""), tokens, strict=True)
        ]
        with probe._mode("codes"):
            runs = list(probe._run(asked))
            (alone,) = probe._run(asked[1:2])
        assert [len(ids) - n + 1 for (ids, _), n in zip(runs, tokens, strict=True)] == [
            len(hidden) for _, hidden in runs
        ]
        assert len(runs[0][1]) == 1 < len(runs[1][1])
        assert torch.equal(runs[1][1], alone[1])
        ids, logprobs = runs[0][0], probe._logprobs(runs[0][1])[0]
        with probe._mode("codes", exact=(1,)):
            lifted = probe._logprobs(next(probe._run(asked))[1])[0]
        with probe._mode("exact"):
            exact = probe._logprobs(next(probe._run(asked))[1])[0]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    other = [{**messages[0], "content": [messages[0]["content"][0], {"type": "text", "text": "?"}]}]
    for settings, expected in (({}, logprobs), ({"layers_16bit": [1]}, lifted)):
        with Engine(checkpoint, "calibquant1", {"profile": str(out), **settings}) as engine:
            engine.llm.chat(other, params, use_tqdm=False)
            served = Served.of(engine.llm.chat(messages, params, use_tqdm=False)[0])
        assert served.hit == 256
        assert list(served.prompt) == list(ids)
        for token, logprob in served.logprobs[0].items():
            assert expected[token].item() == pytest.approx(logprob, abs=1e-3)
    assert (logprobs - exact).abs().max() > 1e-2
    assert (logprobs - lifted).abs().max() > 1e-2


def test_command_leaves_a_layer_at_16_bits(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """With the room of 4 bits one of six layers may have 16 and the others 2.5.

    It is hardly worth it, and so what it must gain is put out of the way.
    """
    from tests.serving.engine import Engine

    monkeypatch.setattr("vllm_calibquant.calibrate.search.SLOWER_WORTHWHILE", 1e9)
    out = tmp_path / "profile.safetensors"
    llm = {"max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}
    command = ["calibrate", str(model_path()), "--data", str(data), "--bits", "4", "--trials", "0"]
    main([*command, "--max-tokens", "5", "--llm", json.dumps(llm), "--out", str(out)])
    said = capsys.readouterr().out
    profile = load_profile(out)
    (layer,) = profile.layers_16bit
    assert profile.average_bits == 2.5
    assert profile.notes["steps"][1] == [
        f"layer {layer} at 16 bits, others 2.5", profile.notes["score"]["kl"]
    ]  # fmt: skip
    assert "2.5 bits a number on average, 80 visual tokens a page (5x)" in said
    assert f"and 16 bits in layer {layer}: together 3x" in said
    image = {"type": "image_pil", "image_pil": load_prompts(str(data), 1, 1)[0].images[0]}
    with Engine(model_path(), "calibquant1", {"profile": str(out)}) as engine:
        cache = engine.llm.llm_engine.vllm_config.cache_config
        (answer,) = engine.llm.chat([{"role": "user", "content": [image]}], use_tqdm=False)
    assert cache.kv_cache_dtype_skip_layers == [str(layer)]
    assert answer.outputs[0].token_ids


def test_an_interrupted_command_goes_on(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Ended in its second score, with half a record in its log, it repeats nothing.

    Nor does it lose what it has found where an engine for layers at 16 bits does not start.
    """
    out = tmp_path / "profile.safetensors"
    llm = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 32 << 20}
    command = ["calibrate", str(checkpoint), "--data", str(data), "--bits", "1.25"]
    command += ["--max-tokens", "5", "--trials", "2", "--out", str(out), "--llm", json.dumps(llm)]
    answers, score = Probe.answers, Probe.score
    asked: list[int] = []
    scored: list[float] = []

    def count_answers(probe: Probe, prompts: list) -> list[Answer]:
        asked.append(len(prompts))
        return answers(probe, prompts)

    def count_scores(probe: Probe, *args: object) -> Score:
        if len(scored) == 1 and len(asked) == 2:
            raise KeyboardInterrupt
        found = score(probe, *args)
        scored.append(found.kl)
        return found

    monkeypatch.setattr(Probe, "answers", count_answers)
    monkeypatch.setattr(Probe, "score", count_scores)
    monkeypatch.setattr("vllm_calibquant.calibrate.command.BATCH", 2)
    with pytest.raises(SystemExit, match="130"):
        main(command)
    assert (asked, len(scored)) == ([2, 1], 1)
    (log,) = tmp_path.iterdir()
    assert log.name == f"{out.name}.search.jsonl"
    assert [*map(list, map(json.loads, log.open()))] == [
        ["task"], ["answers"], ["answers"], ["choice", "score"]
    ]  # fmt: skip
    with log.open("a") as file:
        file.write('{"choice": "{')
    asked.append(0)  # from here on scores are not interrupted

    def leave_layers(*args: object) -> None:
        raise RuntimeError("too little memory")

    monkeypatch.setattr("vllm_calibquant.calibrate.command.leave_layers", leave_layers)
    main(command)
    said = capsys.readouterr().out
    assert "layers at 16 bits were not tried: too little memory" in said
    assert "held out from the statistics" in said
    assert (asked, len(scored)) == ([2, 1, 0], 3 + 3)  # each layer at 16 bits, in the end
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    notes = load_profile(out).notes
    assert notes["steps"][0][1] == scored[0]  # as the first run had it
    assert notes["score"]["kl"] in scored


def test_what_the_command_chooses(monkeypatch, capsys) -> None:
    command = "vllm_calibquant.calibrate.command.calibrate"
    monkeypatch.setattr(command, lambda task: json.dumps([str(task.out), task.llm]))
    main(["calibrate", "someone/reader", "--data", "synthetic", "--bits", "1.5"])
    out, llm = json.loads(capsys.readouterr().out)
    assert out == "reader-1.5.safetensors"
    assert llm == ({} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 4 << 30})
    main(
        ["calibrate", "m", "--data", "d", "--out", "p", "--llm", '{"gpu_memory_utilization": 0.5}']
    )
    assert json.loads(capsys.readouterr().out) == ["p", {"gpu_memory_utilization": 0.5}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "0 is not above 0"),
        (["--max-tokens", "-3"], "-3 is not above 0"),
        (["--llm", "[1]"], "is no JSON object"),
        (["--bits", "nan"], "--bits nan is not possible"),
        (["--count", "1"], "at least 2 prompts"),
    ],
)
def test_impossible_arguments_are_named(tmp_path: Path, capsys, arguments, message) -> None:
    command = ["calibrate", str(model_path()), "--data", "synthetic", *arguments]
    with pytest.raises(SystemExit) as error:
        main([*command, "--out", str(tmp_path / "p")])
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_an_interrupted_command_says_so(tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(task):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_calibquant.calibrate.command.calibrate", interrupted)
    with pytest.raises(SystemExit) as error:
        main(["calibrate", "m", "--data", "synthetic", "--out", str(tmp_path / "p")])
    assert error.value.code == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err


def test_refusals_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a directory; give the name of a file in it"):
        main(["calibrate", "m", "--data", "synthetic", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="there is no directory"):
        main(["calibrate", "m", "--data", "synthetic", "--out", str(tmp_path / "no" / "p")])
    with pytest.raises(SystemExit, match=r"there is no .*prompts\.jsonl"):
        main(["calibrate", "m", "--data", str(tmp_path), "--out", str(tmp_path / "p")])
