"""What the records of :mod:`benchmarks.accuracy` say, as tables and a plot of the README.

A setting's numbers are those of the newest record that has it: a later run need not ask again what
has not changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.records import RECORDS, no_record

PLOT = "accuracy.png"
NOT_MEASURED = ["Not measured yet."]
MODES = {"decode": "asked cold", "prefix-hit": "after a prefix hit"}
DEFAULTS = ("auto", "fp8", "calibquant4", "calibquant2", "calibquant1")
PAPER = "calibquant1 preset=calibquant-paper"
STOCK = ("fp8", "int4", "turboquant")
LOST_MOST = 3
"""Tasks that are named."""

Entry = dict[str, Any]
"""A setting of a record."""


def latest(folder: Path) -> tuple[dict[str, Entry], dict[str, tuple[Path, dict[str, Any]]]]:
    """Entries by setting, and the record that each comes from.

    All are answers of one model to one set of questions, those of the newest record.
    """
    entries: dict[str, Entry] = {}
    sources: dict[str, tuple[Path, dict[str, Any]]] = {}
    asked = None
    for path in sorted(folder.glob("accuracy-[0-9]*.json"), reverse=True):
        record = json.loads(path.read_text(encoding="utf-8"))
        if asked not in (None, (record["model"], record["data"])):
            continue
        asked = record["model"], record["data"]
        for entry in record["settings"]:
            if entry["setting"] not in entries:
                entries[entry["setting"]] = entry
                sources[entry["setting"]] = path, record
    return entries, sources


def together(folder: Path = RECORDS) -> dict[str, Any]:
    """The same as one record, 16 bits first.

    Raises
    ------
    FileNotFoundError
        If there is no record.
    """
    entries, _ = latest(folder)
    if not entries:
        raise no_record("accuracy", folder)
    settings = sorted(entries.values(), key=lambda entry: entry["setting"] != "auto")
    modes = dict.fromkeys(mode for entry in settings for mode in entry["modes"])
    return {"modes": [*modes], "settings": settings}


def is_learned(setting: str) -> bool:
    """Whether a setting has a profile."""
    return "profile=" in setting


def label(entry: Entry, code: str = "") -> str:
    """Short name of a setting, with ``code`` around what is typed."""
    dtype, *options = entry["setting"].split()
    if is_learned(entry["setting"]):
        return f"profile of {entry['bits']:g} bit{'s' * (entry['bits'] != 1)}"
    if entry["setting"] == "auto":
        return "16 bits"
    options = [option.replace("=", ": ") for option in options]
    return ", ".join(f"{code}{part}{code}" for part in (dtype, *options))


def cells(entry: Entry, first: Entry) -> list[str]:
    """Bytes, and for each mode exact match with what was lost."""
    found = [f"{entry['bytes_per_visual_token']:,.0f}"]
    for mode in MODES:
        result = entry["modes"].get(mode)
        if result is None:
            found.append("-")
        elif entry is first:
            found.append(f"{result['mean']:.1f}")
        else:
            # Less than 0 is noise too.
            lost = f"{result['drop'] + 0.0:.1f} ± {result['drop_half_interval']:.1f}"
            found.append(f"{result['mean']:.1f} ({lost.replace('-0.0', '0.0')})")
    return found


def table(entries: list[Entry], first: Entry) -> list[str]:
    """Lines of a Markdown table of some settings."""
    header = ["", "bytes a visual token", *MODES.values()]
    rows = [[label(entry, "`"), *cells(entry, first)] for entry in entries]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def whence(sources: dict[str, tuple[Path, dict[str, Any]]], entries: list[Entry]) -> str:
    """Questions, devices and records."""
    counts = {
        task["n"]
        for e in entries
        for result in e["modes"].values()
        for task in result["tasks"].values()
    }
    used = dict(sources[e["setting"]] for e in entries)
    n = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
    records = "; ".join(
        f"{record['device']}, {record['date'][:10]}: [{path.name}](benchmarks/records/{path.name})"
        for path, record in sorted(used.items(), reverse=True)
    )
    return f"{n} questions of each kind. {records}."


def padded(entries: list[Entry], first: Entry) -> list[Entry]:
    """Settings of TurboQuant whose layers at 16 bits decide the size of every page."""
    size = first["bytes_per_visual_token"]
    return [
        e
        for e in entries
        if e["setting"].startswith("turboquant") and e["bytes_per_visual_token"] == size
    ]


def accuracy_region(folder: Path) -> list[str]:
    """Settings without a profile."""
    entries, sources = latest(folder)
    if "auto" not in entries:
        return NOT_MEASURED
    first = entries["auto"]
    chosen = [entries[name] for name in (*DEFAULTS, PAPER) if name in entries]
    stock = [e for name, e in entries.items() if name.startswith(STOCK) and e not in chosen]
    chosen += [e for e in stock if e["modes"]]
    lines = [*table(chosen, first), "", f"* {whence(sources, chosen)}"]
    if padded(chosen, first):
        lines += [
            "* TurboQuant's bytes mislead here: vLLM keeps the first two and the last two layers "
            "at 16 bits, which are four of this model's six, and pads the pages of the others to "
            "the same size."
        ]
    for entry in stock:
        if not entry["modes"]:
            lines += [f"* `{entry['setting']}` of stock vLLM ended in an error with this model."]
    one = entries.get("calibquant1")
    if one and "prefix-hit" in one["modes"]:
        before, after = (e["modes"]["prefix-hit"]["tasks"] for e in (first, one))
        lost = {task: before[task]["exact_match"] - after[task]["exact_match"] for task in after}
        most = sorted(lost, key=lambda task: -lost[task])
        named, least = (
            ", ".join(f"{lost[task]:.0f} in `{task}`" for task in some)
            for some in (most[:LOST_MOST], most[:-LOST_MOST:-1])
        )
        lines += [
            f"* The points that `calibquant1` loses after a prefix hit differ from kind to kind of "
            f"question: {named}, but {least}."
        ]
    return lines


def profiles_region(folder: Path) -> list[str]:
    """Settings with a profile, among those with one width for all."""
    entries, sources = latest(folder)
    learned = sorted(filter(is_learned, entries), key=lambda name: entries[name]["bits"])
    if "auto" not in entries or not learned:
        return NOT_MEASURED
    names = ["calibquant1", *learned, "calibquant2"]
    chosen = [entries[name] for name in names if name in entries]
    return [*table(chosen, entries["auto"]), "", whence(sources, chosen)]


# The plot.


def plot_data(settings: list[Entry]) -> list[dict[str, Any]]:
    """What the plot shows of the settings of a record that were measured."""
    return [
        {
            "setting": s["setting"],
            "label": label(s),
            "bytes": s["bytes_per_visual_token"],
            "modes": {m: [r["drop"], r["drop_half_interval"]] for m, r in s["modes"].items()},
        }
        for s in settings
        if s["modes"] and "bytes_per_visual_token" in s
    ]


def plot(data: list[dict[str, Any]], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Draw points lost against bytes of a visual token, a panel for each mode."""
    from matplotlib import pyplot as plt

    shown = data[1:]
    modes = [mode for mode in data[0]["modes"] if any(mode in s["modes"] for s in shown)]
    figure, panels = plt.subplots(
        1, len(modes), figsize=(1 + 4.2 * len(modes), 4.4), sharey=True, squeeze=False
    )
    series: dict[str, list[dict[str, Any]]] = {}
    joined = "one width for all: 1, 2, 4 bits", "profiles: learned bit planes"
    for s in shown:
        if s["setting"] in DEFAULTS[2:]:
            series.setdefault(joined[0], []).append(s)
        elif is_learned(s["setting"]):
            series.setdefault(joined[1], []).append(s)
        elif s["setting"].startswith("turboquant"):
            why = ": pages padded to 16-bit layers'" if s["bytes"] == data[0]["bytes"] else ""
            series.setdefault(f"TurboQuant k8v4, 4bit, 3bit{why}", []).append(s)
        else:
            series.setdefault(s["label"], []).append(s)
    sizes = sorted({round(s["bytes"]) for s in data})
    ticks = (0, 0.5, 1, 2, 5, 10, 20, 50)
    for mode, axes in zip(modes, panels[0], strict=True):
        for i, (name, some) in enumerate(series.items()):
            points = sorted((s["bytes"], *s["modes"][mode]) for s in some if mode in s["modes"])
            axes.errorbar(
                [x for x, _, _ in points],
                [max(drop, 0) for _, drop, _ in points],
                yerr=[half for _, _, half in points],
                color=f"C{i}",
                marker="osD^vP*X"[i % 8],
                linestyle="-" if name in joined else "none",
                capsize=2,
                label=name,
            )
        axes.set_xscale("log", base=2)
        names = [f"{size:,}" for size in sizes[:-1]] + [f"16 bits: {sizes[-1]:,}"]
        axes.set_xticks(sizes, names, rotation=45, ha="right", fontsize=8)
        axes.minorticks_off()
        axes.set_yscale("symlog", linthresh=1)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(60, -0.15)
        axes.set_title(MODES.get(mode, mode), fontsize=10)
        axes.set_xlabel("bytes of KV cache a visual token")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("points of exact match lost")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=2, fontsize=8, loc="outside lower center")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
