"""Grouped bars of settings by format: one colour and one hatch a setting, in every report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# Lightness falls from left to right and hatches differ, so that print in grey reads alike.
STYLES: Mapping[str, tuple[str, str]] = {
    "identity": ("#d9d9d9", ""),
    "random": ("#c6dbef", ".."),
    "hadamard": ("#9ecae1", "//"),
    "wus": ("#a1d99b", "\\\\"),
    "wush": ("#41ab5d", ""),
    "PAPER": ("#fd8d3c", "xx"),
    "BEST": ("#a50f15", ""),
    "BEST_WIDE": ("#3f007d", "//"),
}
OTHER = ("#969696", "++")


def grouped_bars(axes: Any, values: Mapping[str, Mapping[str, float]], label: str) -> None:
    """Draw values by group and setting as bars, with the value on each.

    Args:
      axes: of matplotlib; its y axis becomes logarithmic where all values are positive.
      values: numbers by group, such as a format, and by setting.
      label: of the y axis.
    """
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    width = 0.85 / max(len(names), 1)
    for i, name in enumerate(names):
        color, hatch = STYLES.get(name, OTHER)
        places = [j for j, group in enumerate(values.values()) if name in group]
        heights = [group[name] for group in values.values() if name in group]
        at = np.array(places) + (i - (len(names) - 1) / 2) * width
        bars = axes.bar(at, heights, width, color=color, hatch=hatch, edgecolor="white", label=name)
        said = [f"{height:.3g}" for height in heights]
        axes.bar_label(bars, said, fontsize=7, rotation=90, padding=2)
    if all(value > 0 for group in values.values() for value in group.values()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.12)  # room for the labels
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
