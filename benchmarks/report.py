"""Tables and plots of README.md and docs/serving.md, from records: ``python -m benchmarks.report``.

A table stands between two marks in a document; nobody edits it by hand, and ``--check`` fails where
documents or plots do not say what the records say.  A plot carries a digest of the numbers that
it shows, so that checking needs no matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import accuracy_report
from benchmarks.records import RECORDS, newest_records
from benchmarks.serving_summary import (
    EIGHT_BITS,
    NO_HARM,
    NOT_MEASURED,
    OURS,
    ROWS,
    STOCK,
    Figure,
    Ratio,
    Run,
    crossings,
    figure,
    load_runs,
    of_one_device,
    ratio,
)

README = Path(__file__).parents[1] / "README.md"
DETAILS = README.parent / "docs" / "serving.md"
PLOT = "serving-visual-share.png"
DIGEST = "Digest"

LABELS = {
    "auto": "`auto` (bf16)",
    "bfloat16": "`bfloat16` (the same)",
    "fp8": "`fp8`",
    "int4_per_token_head": "`int4_per_token_head`",
    "turboquant_k8v4": "`turboquant_k8v4`",
    "turboquant_4bit_nc": "`turboquant_4bit_nc`",
    "turboquant_3bit_nc": "`turboquant_3bit_nc`",
    "calibquant1": "**`calibquant1`**",
    "calibquant1+hadamard": "`calibquant1`, `transform: hadamard`",
    "calibquant1+profile1": "`calibquant1`, profile of 1 bit",
    "calibquant1+profile1.25": "`calibquant1`, profile of 1.25 bits",
    "calibquant1+profile1.5": "`calibquant1`, profile of 1.5 bits",
    "calibquant2": "`calibquant2`",
    "calibquant4": "`calibquant4`",
}
MODELS = {
    "internvl3-8b": "InternVL3-8B",
    "internvl2.5-26b": "InternVL2.5-26B",
    "llava-1.5-7b": "LLaVA-1.5-7B",
}


def begin(name: str) -> str:
    """First mark of a region."""
    return f"<!-- {name}: made by `python -m benchmarks.report`, do not edit -->"


def end(name: str) -> str:
    """Last mark of a region."""
    return f"<!-- end of {name} -->"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = (header, ["---"] * len(header), *rows)
    return ["| " + " | ".join(line) + " |" for line in lines]


def number(value: float | str | None) -> str:
    """For a table: three figures, or all of a large number; names as code."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value if value == "none" else ", ".join(f"`{name}`" for name in value.split(", "))
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def where(used: list[Ratio]) -> str:
    """Devices and records of some ratios, in words; a record's name has its date."""
    found: dict[str, set[str]] = {}
    for one in used:
        found.setdefault(one.run.device, set()).update(one.records)
    return "; ".join(
        f"{device}, " + ", ".join(f"[{r}](benchmarks/records/{r})" for r in sorted(records))
        for device, records in found.items()
    )


def goals_region(runs: list[Run]) -> list[str]:
    """Ratios of the goals on one device, and which are met."""
    runs = of_one_device(runs)
    rows, used = [], []
    met: list[bool] = []
    for row in ROWS:
        line = [row.name]
        for baseline in (STOCK, EIGHT_BITS):
            found = ratio(row, baseline, runs)
            goal = row.goals.get(baseline)
            if found is None:
                line.append(NOT_MEASURED if goal else "")
                continue
            used.append(found)
            values = f"x ({number(found.ours)} against {number(found.baseline)})"
            if goal is None:
                line.append(f"{found.ratio:.2f}{values}")
                continue
            met.append(goal.met(found.ratio))
            line.append(f"{goal.spell(found.ratio)}{values}, {goal.verdict(found.ratio)}")
        rows.append(line)
    if not used:
        return ["Not measured yet: no record has codes and stock vLLM in one run on a GPU."]
    return [
        *table(["`calibquant1`, InternVL3-8B shape", "against bf16", "against fp8"], rows),
        "",
        f"Goals: {sum(met)} of {len(met)} are met. Measured on: {where(used)}.",
    ]


LONG_COLUMNS = {
    "16k visual tokens a request, 20 GB: tokens/s": figure(
        "long-context", "decode_tokens_per_s", budget_gb=20
    ),
    "longest video in 0.5 GB, visual tokens": figure(
        "longest-video", "most_visual_tokens", layout="one span"
    ),
    "the same in frames of 256": figure("longest-video", "most_visual_tokens", layout="frames"),
}
VIDEO_COLUMNS = {
    f"{tokens:,}: {label}": figure("video", name, visual_tokens=tokens)
    for tokens in (16640, 66560, 133120)
    for label, name in (("first token, ms", "first_token_ms"), ("step, ms", "step_ms_median"))
}
END_TO_END_COLUMNS = {
    "requests": "requests",
    "tokens/s": "output_tokens_per_s",
    "first token, ms": "first_token_ms_median",
    "first token, p99": "first_token_ms_p99",
    "between tokens, ms": "inter_token_ms_median",
    "between tokens, p99": "inter_token_ms_p99",
}
BUDGETS = (2, 5, 10, 20)
CHAT_COLUMNS = {
    f"{times}x: {label}": figure("image-chats", name, working_set=times, images_a_user=1)
    for times in (1, 6, 20)
    for label, name in (
        ("turns/s", "turns_per_s"),
        ("first token, ms", "first_token_ms_median"),
        ("hit rate", "hit_rate"),
    )
}
"""By working set, in what bf16 pages hold."""
HTTP_COLUMNS = {
    "start, s": figure("http", "seconds", what="start"),
    **{
        label: figure("http", name, what=what)
        for label, what, name in (
            ("fixed lengths: tokens/s", "text, fixed lengths", "output_tokens_per_s"),
            ("chat lengths: tokens/s", "text, chat lengths", "output_tokens_per_s"),
            ("16 at a time: tokens/s", "text, few at a time", "output_tokens_per_s"),
            ("lone image: first token, ms", "lone image request", "first_token_ms_median"),
            ("of it in the engine", "lone image request", "engine_first_token_ms_mean"),
            ("questions: tokens/s", "questions on images", "output_tokens_per_s"),
            ("questions: first token, ms", "questions on images", "first_token_ms_median"),
            ("questions: hit rate", "questions on images", "hit_rate"),
            ("compiled late", "compiled while serving", "kernels"),
        )
    },
}
"""What was *compiled late*, while a request waited, are names of kernels."""


def dtypes_region(runs: list[Run], columns: dict[str, Figure]) -> list[str]:
    """Every KV cache dtype that was measured, in numbers, run by run and model by model."""
    lines: list[str] = []
    for run in runs:
        for model, title in MODELS.items():
            found = []
            for dtype in sorted(run.dtypes(model), key=list(LABELS).index):
                values = [column.of(run, dtype, model) for column in columns.values()]
                if any(v is not None for v in values):
                    found.append([LABELS[dtype], *map(number, values)])
            if found:
                lines += [*table([f"{title}, {run.device}", *columns], found), ""]
    return lines[:-1] or ["Not measured yet."]


def budgets_region(runs: list[Run]) -> list[str]:
    """Decoding at each KV budget, in how many requests, and how many times as fast as others."""
    lines: list[str] = []
    for run in runs:
        for model, title in MODELS.items():
            rates: dict[str, list[float | None]] = {}
            rows = []
            for dtype in sorted(run.dtypes(model), key=list(LABELS).index):
                cells = [_decoding(run, dtype, model, budget) for budget in BUDGETS]
                if not any(cells):
                    continue
                rates[dtype] = [c["decode_tokens_per_s"] if c else None for c in cells]
                said = [
                    f"{number(c['decode_tokens_per_s'])} ({c['requests']})" if c else "-"
                    for c in cells
                ]
                rows.append([LABELS[dtype], *said])
            for baseline in (STOCK, EIGHT_BITS):
                if OURS in rates and baseline in rates:
                    pairs = zip(rates[OURS], rates[baseline], strict=True)
                    times = [f"{a / b:.1f}x" if a and b else "-" for a, b in pairs]
                    rows.append([f"`{OURS}` against {LABELS[baseline]}", *times])
            if rows:
                header = [f"{title}, {run.device}", *(f"{budget} GB" for budget in BUDGETS)]
                lines += [*table(header, rows), ""]
    return lines[:-1] or ["Not measured yet."]


def end_to_end_region(runs: list[Run]) -> list[str]:
    """Rates and latencies of every KV cache dtype at each KV budget, all prompts computed."""
    lines: list[str] = []
    for run in runs:
        for model, title in MODELS.items():
            rows = []
            for budget in BUDGETS:
                for dtype in sorted(run.dtypes(model), key=list(LABELS).index):
                    cell = run.find("end-to-end", dtype, model, budget_gb=budget, outputs=1024)
                    if cell:
                        values = [cell.get(name) for name in END_TO_END_COLUMNS.values()]
                        rows.append([f"{budget} GB, {LABELS[dtype]}", *map(number, values)])
            if rows:
                lines += [*table([f"{title}, {run.device}", *END_TO_END_COLUMNS], rows), ""]
    return lines[:-1] or ["Not measured yet."]


def _decoding(run: Run, dtype: str, model: str, budget: float) -> dict[str, Any] | None:
    """A cell of decoding: the first budget of a run is another scenario's."""
    for scenario in ("decode", "resident"):
        cell = run.find(scenario, dtype, model, budget_gb=budget, outputs=300)
        if cell and cell.get("decode_tokens_per_s"):
            return cell
    return None


def crossing_region(runs: list[Run]) -> list[str]:
    """Below which visual share another dtype is better."""
    lines = []
    for name, label in (
        ("requests", "requests in the pool"),
        ("decode_tokens_per_s", "decode tokens/s"),
    ):
        for baseline in (EIGHT_BITS, "int4_per_token_head"):
            run = next((r for r in runs if crossings(r, baseline, name) is not None), None)
            if run is None:
                continue
            found = crossings(run, baseline, name) or []
            if found:
                at = ", ".join(f"{x:.0f} %" for x in found)
                lines.append(f"* {label}, against `{baseline}`: equal at {at} visual tokens.")
            else:
                lines.append(f"* {label}, against `{baseline}`: no crossing between 0 and 100 %.")
    if not lines:
        return ["Where codes lose has not been measured on a GPU yet."]
    return [*lines, "", f"![decode speed by visual share](benchmarks/records/{PLOT})"]


NO_KERNELS = ["The kernels have not been measured yet."]
KERNEL_SHAPE = "query × KV heads, tokens × batch"


def kernel_shape(heads: int, kv_heads: int, *tokens_and_batch: int) -> str:
    """A shape in a row under KERNEL_SHAPE; new tokens come before cached ones."""
    *tokens, batch = tokens_and_batch
    return f"{heads} × {kv_heads}, {' behind '.join(f'{n:,}' for n in tokens)} × {batch}"


def kernels_source(path: Path, record: dict[str, Any], records: str) -> str:
    """Device, day and file of a record of kernels, for a document that sees it in a folder."""
    return f"{record['device']}, {record['date'][:10]}, [{path.name}]({records}/{path.name})."


def kernels_region(folder: Path) -> list[str]:
    """Decode attention of the newest records of :mod:`benchmarks.kernels`, a table a device."""
    try:
        records = newest_records("kernels", folder)
    except FileNotFoundError:
        return NO_KERNELS
    tables = [kernels_table(path, record) for path, record in records.items()]
    return [line for lines in tables for line in ("", *lines)][1:]


def kernels_table(path: Path, record: dict[str, Any]) -> list[str]:
    """One of them, and where it comes from."""
    header = [KERNEL_SHAPE, "FA3 bf16", "FA3 fp8"]
    rows = []
    for found in record["decode"]:
        stock = found["fa3_bf16_us"]
        row = [kernel_shape(*found["shape"]), number(stock)]
        row.append(number(found["fa3_fp8_us"]))
        for name in ("plain_us", "calibrated_us"):
            row += [number(found[name]), f"{stock / found[name]:.1f}x"]
        rows.append(row)
    return [
        *table([*header, "1 bit", "", "1 bit, calibrated", ""], rows),
        "",
        kernels_source(path, record, "benchmarks/records"),
    ]


def formats_region(folder: Path) -> list[str]:
    """Decode in other formats, and prefill, of the newest record of :mod:`benchmarks.kernels`."""
    try:
        records = newest_records("kernels", folder)
    except FileNotFoundError:
        return NO_KERNELS
    path, record = max(records.items(), key=lambda item: item[1]["date"])
    times = ("fa3_16bit_us", "fa3_fp8_us", "plain_us", "calibrated_us")
    decode, prefill = [], []
    for found in record["wide"]:
        what = f"{found['bits']:g} bit{'s' * (found['bits'] != 1)}"
        what = f"profile of {what}" if found["profile"] else what
        if found["kernel"] != "auto":
            what += ", plain Triton"
        row = [kernel_shape(*found["shape"]), what, str(found["head_size"]), found["dtype"]]
        decode.append([*row, *(number(found[name]) for name in times)])
    for found in record["prefill"]:
        row = [kernel_shape(*found["shape"]), found["dtype"]]
        prefill.append([*row, *(number(found[name]) for name in times if name in found)])
    ours = ["ours", "ours, calibrated"]
    return [
        *table(
            [KERNEL_SHAPE, "codes", "head size", "dtype", "FA3 16 bit", "FA3 fp8", *ours], decode
        ),
        "",
        *table([KERNEL_SHAPE, "dtype", "FA3 16 bit", *ours], prefill),
        "",
        kernels_source(path, record, "../benchmarks/records"),
    ]


REGIONS: dict[str, Callable[[Path], list[str]]] = {
    "decode kernels": kernels_region,
    "kernels in other formats": formats_region,
    "accuracy": accuracy_report.accuracy_region,
    "accuracy with profiles": accuracy_report.profiles_region,
    "serving goals": lambda folder: goals_region(load_runs(folder)),
    "serving budgets": lambda folder: budgets_region(load_runs(folder)),
    "serving long contexts": lambda folder: dtypes_region(load_runs(folder), LONG_COLUMNS),
    "serving end to end": lambda folder: end_to_end_region(load_runs(folder)),
    "serving without harm": lambda folder: dtypes_region(load_runs(folder), NO_HARM),
    "serving chats": lambda folder: dtypes_region(load_runs(folder), CHAT_COLUMNS),
    "serving over HTTP": lambda folder: dtypes_region(load_runs(folder), HTTP_COLUMNS),
    "serving videos": lambda folder: dtypes_region(load_runs(folder), VIDEO_COLUMNS),
    "serving crossings": lambda folder: crossing_region(load_runs(folder)),
}


DECISIVE = (
    "decode kernels",
    "accuracy",
    "accuracy with profiles",
    "serving goals",
    "serving crossings",
)
"""Regions that decide whether codes are for a reader: the README's."""

DOCUMENTS = {README: DECISIVE, DETAILS: tuple(name for name in REGIONS if name not in DECISIVE)}


def render(text: str, folder: Path, regions: Iterable[str] = tuple(REGIONS)) -> str:
    """A document with its regions made anew from a folder of records.

    Raises
    ------
    ValueError
        If a region's marks are missing.
    """
    for name in regions:
        first, last = begin(name), end(name)
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"the marks {first!r} and {last!r} are needed, once each")
        head, rest = text.split(first)
        tail = rest.split(last)[1]
        text = "\n".join([head + first, "", *REGIONS[name](folder), "", last]) + tail
    return text


def plot_data(runs: list[Run]) -> dict[str, dict[str, list[list[float]]]]:
    """By what is shown and KV cache dtype: points of visual share and value, of the newest run that
    has something to compare.
    """
    for run in runs:
        data: dict[str, dict[str, list[list[float]]]] = {}
        for name in ("requests", "decode_tokens_per_s"):
            for dtype in run.dtypes():
                shares = sorted(
                    {c["visual_share"] for c in run.cells if c.get("visual_share") is not None}
                )
                cells = [(s, run.find("mix", dtype, visual_share=s)) for s in shares]
                points = [[s, c[name]] for s, c in cells if c and c.get(name)]
                if len(points) > 1:
                    data.setdefault(name, {})[dtype] = points
        if any(len(by_dtype) > 1 for by_dtype in data.values()):
            return data
    return {}


def digest(data: Any) -> str:
    """Of what a plot shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def plot(data: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw what :func:`plot_data` found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"requests": "requests in the pool", "decode_tokens_per_s": "decode tokens/s"}
    figure, axes = pyplot.subplots(1, len(data), figsize=(4.8 * len(data), 3.6), squeeze=False)
    for axis, (name, by_dtype) in zip(axes[0], data.items(), strict=True):
        for dtype, points in sorted(by_dtype.items(), key=lambda item: list(LABELS).index(item[0])):
            shares, values = zip(*points, strict=True)
            ours = dtype.startswith("calibquant")
            axis.plot(shares, values, marker="o", linewidth=2.2 if ours else 1.2, label=dtype)
        axis.set_xlabel("visual tokens of the prompt, %")
        axis.set_title(titles[name])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={DIGEST: digest(data)})
    pyplot.close(figure)


def plots(folder: Path) -> dict[str, tuple[Any, Callable[[Any, Path], None]]]:
    """By file: what a plot of the records shows, and what draws it."""

    def accuracy(data: Any, path: Path) -> None:
        accuracy_report.plot(data, path, {DIGEST: digest(data)})

    settings, _ = accuracy_report.latest(folder)
    return {
        PLOT: (plot_data(load_runs(folder)), plot),
        accuracy_report.PLOT: (accuracy_report.plot_data(list(settings.values())), accuracy),
    }


def plot_digest(path: Path) -> str | None:
    """Digest of what a plot shows; None if there is no plot."""
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)


def problems(
    documents: Mapping[Path, Iterable[str]] = DOCUMENTS, folder: Path = RECORDS
) -> list[str]:
    """Where documents and plots do not say what the records say."""
    found = []
    for path, regions in documents.items():
        text = path.read_text(encoding="utf-8")
        if render(text, folder, regions) != text:
            found.append(f"{path.name} does not say what the records say")
    for name, (data, _) in plots(folder).items():
        if data and plot_digest(folder / name) != digest(data):
            found.append(f"{name} does not show what the records say")
    return [f"{problem}; run python -m benchmarks.report" for problem in found]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    args = parser.parse_args()
    if args.check:
        found = problems()
        print("\n".join(found) or "documents and plots agree with the records")
        sys.exit(bool(found))
    for path, regions in DOCUMENTS.items():
        text = render(path.read_text(encoding="utf-8"), RECORDS, regions)
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {', '.join(regions)}")
    for name, (data, draw) in plots(RECORDS).items():
        if data:
            draw(data, RECORDS / name)


if __name__ == "__main__":
    main()
