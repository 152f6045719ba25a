"""Figures of ``docs/method.md``: ``python -m docs.figures`` draws them from files alone.

Bits and searches come from the profiles in ``tests/tinyvlm/profiles``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from tests.tinyvlm.profiles import WIDTHS, profile_path
from vllm_calibquant.profile import Profile, load_profile

HERE = Path(__file__).parent


def main() -> None:
    """Draw all figures."""
    profiles = {bits: load_profile(profile_path(bits)) for bits in WIDTHS}
    draw_bits(profiles, HERE / "bits.png")
    draw_search(profiles, HERE / "search.png")


def draw_bits(profiles: dict[float, Profile], path: Path) -> None:
    """How many components of K and of V have 0, 1, 2 ... bits, layer by layer."""
    figure, panels = plt.subplots(1, len(profiles), figsize=(3.6 * len(profiles), 3), sharey=True)
    for axes, (bits, profile) in zip(panels, profiles.items(), strict=True):
        for part, offset in (("key", -0.2), ("value", 0.2)):
            bottom = [0] * len(profile.layers)
            for width in range(5):
                counts = [
                    getattr(layer, part).bits.count(width) for layer in profile.layers.values()
                ]
                axes.bar(
                    [i + offset for i in profile.layers],
                    counts,
                    0.36,
                    bottom,
                    color=plt.get_cmap("viridis")(1 - width / 4),
                    label=f"{width} bit{'s' * (width != 1)}" if part == "key" else None,
                )
                bottom = [a + b for a, b in zip(bottom, counts, strict=True)]
        axes.set_title(f"{bits:g} bit{'s' * (bits != 1)} on average", fontsize=10)
        axes.set_xlabel("layer: K left, V right")
    panels[0].set_ylabel("components of a head")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, fontsize=8, loc="outside lower center")
    _save(figure, path)


def draw_search(profiles: dict[float, Profile], path: Path) -> None:
    """Divergence of held-out prompts, step by step of each search."""
    figure, axes = plt.subplots(figsize=(6, 3))
    for bits, profile in profiles.items():
        values = [kl for _, kl in profile.notes["steps"]]
        axes.plot(range(len(values)), values, "o-", label=f"{bits:g} bit{'s' * (bits != 1)}")
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("steps that the search kept, after the closed form")
    axes.set_ylabel("KL to 16 bits, nats a token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
