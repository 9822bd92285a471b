"""The tables that `07_paper_figures.py` prints, as Markdown."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import wush_jax as wush

TRANSFORMS = ("identity", "hadamard", "wus", "wush")
FORMATS = (wush.MXFP4, wush.NVFP4, wush.INT4)
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def rank(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x)).astype(float)


def of(rows: list[dict[str, Any]], fmt: wush.Format, name: str) -> list[dict[str, Any]]:
    return [r for r in rows if (r["format"], r["transform"]) == (fmt.name, name)]


def show_layers(rows: list[dict[str, Any]], layer: str) -> None:
    """Print the losses by transform and format, and how often each transform has the least."""
    print(f"\nloss / output power x 1e3, {layer} and the mean of all layers")
    for fmt in FORMATS:
        losses = {
            name: {r["layer"]: r["relative"] for r in of(rows, fmt, name)} for name in TRANSFORMS
        }
        for name, each in losses.items():
            inside = [path for path in each if path.startswith(layer + ".")]
            cells = [each[next(p for p in inside if f".{kind}_proj" in p)] for kind in KINDS]
            cells.append(float(np.mean(list(each.values()))))
            print(f"| {fmt.name} {name} |", *(f"{1e3 * v:.2f} |" for v in cells))
        paths = list(losses["wush"])
        order = np.argmin([[each[path] for path in paths] for each in losses.values()], axis=0)
        least = [TRANSFORMS[i] for i in order]
        print(fmt.name, "least in", {name: least.count(name) for name in TRANSFORMS}, "layers")


def show_predictions(rows: list[dict[str, Any]]) -> None:
    """Print how far predictions are off, and whether they order layers and transforms rightly."""
    print("\nmeasured / predicted by FP and INT model: median, 10 % and 90 % of the layers")
    for fmt, name in itertools.product(FORMATS, TRANSFORMS):
        cells = [f"{fmt.name} {name}"]
        for model in ("fp", "int"):
            ratio = np.array([r["loss"] / r[model] for r in of(rows, fmt, name)])
            low, middle, high = np.quantile(ratio, [0.1, 0.5, 0.9])
            cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        print("|", " | ".join(cells), "|")
    print("\nrank correlation of measured and predicted, layers x transforms, FP and INT model")
    for fmt in FORMATS:
        chosen = [r for r in rows if r["format"] == fmt.name]
        measured = rank(np.array([r["relative"] for r in chosen]))
        cells = [fmt.name]
        for model in ("fp", "int"):
            guess = rank(np.array([r[model] * r["relative"] / r["loss"] for r in chosen]))
            cells.append(f"{np.corrcoef(measured, guess)[0, 1]:.2f}")
        print("|", " | ".join(cells), "|")


def show(found: dict[str, Any], layer: str) -> None:
    """Print all as Markdown."""
    print("\ntoy: loss / var(eta), FP and INT")
    for name, pair in found["toy"].items():
        print(f"| {name} | {pair[0]:.3f} | {pair[1]:.3f} |")
    print("\nvariances of the channels before and after Hadamard", found["marginals"])
    print("\nlargest / smallest channel, crest of groups: weights; the same of inputs")
    for name, values in found["crests"].items():
        print(f"| {name} |", *(f"{v:.2f} |" for v in values))
    print("\nfloating-point codes", found["codes"])
    show_layers(found["layers"], layer)
    show_predictions(found["layers"])
