"""Grouped bars: every value is drawn and labelled, and each setting looks the same everywhere."""

import pytest
from matplotlib.figure import Figure

from wush_jax.evaluation.bars import STYLES, grouped_bars

pytestmark = pytest.mark.files


def test_values_are_drawn_and_labelled():
    axes = Figure().subplots()
    values = {"MXFP4": {"identity": 0.08, "wush": 0.05}, "NVFP4": {"wush": 0.03}}
    grouped_bars(axes, values, "KL")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["MXFP4", "NVFP4"]
    assert sorted(round(bar.get_height(), 3) for bar in axes.patches) == [0.03, 0.05, 0.08]
    assert {t.get_text() for t in axes.texts} >= {"0.08", "0.05", "0.03"}
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "KL"


def test_nothing_lost_needs_no_logarithm():
    axes = Figure().subplots()
    grouped_bars(axes, {"INT8": {"wush": 0.0, "PAPER": 1.0}}, "KL")
    assert axes.get_yscale() == "linear"


def test_settings_differ_without_colour():
    """Lightness, as a printer sees it, or the hatch."""

    def grey(color):
        r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * r + 0.587 * g + 0.114 * b

    styles = list(STYLES.values())
    for i, (color, hatch) in enumerate(styles):
        for other, hatching in styles[i + 1 :]:
            assert hatch != hatching or abs(grey(color) - grey(other)) > 25
