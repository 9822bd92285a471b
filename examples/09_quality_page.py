"""Tables and a plot of what `examples/08_real_llm.py` has written.

    python examples/09_quality_page.py quality.jsonl --plot quality.png

prints a table of every format in Markdown, ratios to its own ``PAPER`` draw by draw. The page
docs/quality.md holds these, made from docs/figures/quality_llm.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

BASE = "PAPER"
PRESETS = ("FAST", "PAPER", "BEST", "BEST_WIDE")
HEADER = (
    "| {} | draws | bits | KL | to `PAPER` | perplexity | layer loss x 1e3 | worst layer | "
    "same tokens | KL of own text | solver, s |"
)


@dataclass(frozen=True)
class Options:
    """What to read and write.

    Attributes:
      lines: JSON lines of one model.
      plot: where the plot goes.
    """

    lines: tyro.conf.Positional[Path]
    plot: Path | None = None


def read(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the draws of every setting, in order; settings that failed are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, file.read_text().splitlines()):
        if "error" not in record:
            found.setdefault(record["setting"], []).append(record)
    return {name: sorted(draws, key=lambda r: r["draw"]) for name, draws in found.items()}


def ratio(draws: Sequence[Mapping], base: Sequence[Mapping]) -> tuple[float, float] | None:
    """KL and the worst layer's loss to those of the base in the same draws, geometric means."""
    pairs = [(d, b) for d in draws for b in base if d["draw"] == b["draw"]]
    if not pairs:
        return None
    kl = [np.log(d["kl"] / b["kl"]) for d, b in pairs]
    layers = [[np.log(d["layers"][p] / b["layers"][p]) for p in b["layers"]] for d, b in pairs]
    return float(np.exp(np.mean(kl))), float(np.exp(np.mean(layers, axis=0).max()))


def row(name: str, draws: Sequence[Mapping], base: Sequence[Mapping]) -> str:
    """One setting as a line of a table; means over draws."""

    def mean(field: str) -> float:
        return float(np.mean([d[field] for d in draws]))

    kl = [d["kl"] for d in draws]
    spread = f" ({min(kl):.4f} to {max(kl):.4f})" if len(draws) > 1 else ""
    found = ratio(draws, base)
    seconds = [d["solve_seconds"] for d in draws if d["solve_seconds"] is not None]
    cells = [
        f"`{name}`" if name in PRESETS else name,
        str(len(draws)),
        f"{draws[0]['bits']:.2f}",
        f"{np.mean(kl):.4f}{spread}",
        "" if found is None else f"{found[0]:.3f}",
        f"{mean('perplexity'):.2f}",
        f"{1e3 * mean('layer_loss'):.2f}",
        "" if found is None else f"{found[1]:.3f}",
        f"{mean('generation_match'):.1f} +- {mean('generation_match_error'):.1f}",
        f"{mean('generation_kl'):.4f}",
        f"{min(seconds):.1f}" if seconds else "",
    ]
    return "| " + " | ".join(cells) + " |"


def tables(found: Mapping[str, Sequence[Mapping]]) -> str:
    """Return a table for every format."""
    floor = found["unquantized"][0]
    parts = [
        f"Unquantized: KL {floor['kl']:.4f}, perplexity {floor['perplexity']:.2f}, same tokens "
        f"{floor['generation_match']:.1f} +- {floor['generation_match_error']:.1f}, KL of own "
        f"text {floor['generation_kl']:.4f}."
    ]
    formats = dict.fromkeys(name.split()[0] for name in found if name != "unquantized")
    for fmt in formats:
        names = [name for name in found if name.split()[0] == fmt]
        base = found.get(f"{fmt} {BASE}", [])
        lines = [HEADER.format(fmt), "|" + "---|" * 11]
        lines += [row(name.split(" ", 1)[1], found[name], base) for name in names]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(found: Mapping[str, Sequence[Mapping]], file: Path) -> None:
    """Plot the KL of every setting, a dot a draw, beside how long greedy text stays the same."""
    from matplotlib.figure import Figure

    names = [name for name in found if name != "unquantized"]
    names.sort(key=lambda name: -np.mean([d["kl"] for d in found[name]]))
    figure = Figure(figsize=(9.0, 0.24 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colors = {"MXFP4": "tab:blue", "NVFP4": "tab:green", "NVINT4": "tab:red", "INT4": "tab:gray"}
    for name in names:
        color = colors[name.split()[0]]
        for draw in found[name]:
            axes[0].plot(draw["kl"], name, "o", color=color, ms=4)
            axes[1].errorbar(
                draw["generation_match"],
                name,
                xerr=draw["generation_match_error"],
                fmt="o",
                color=color,
                ms=4,
                lw=0.8,
            )
    axes[0].set(xscale="log", xlabel="KL to the float32 model, nats; a dot a draw")
    axes[1].set(xscale="log", xlabel="greedy tokens like the float32 model's")
    for ax in axes:
        ax.grid(axis="x", which="both", alpha=0.3)
    figure.savefig(file, dpi=130)


def main(options: Options) -> None:
    """Print the tables and write the plot."""
    found = read(options.lines)
    print(tables(found))
    if options.plot is not None:
        plot(found, options.plot)


if __name__ == "__main__":
    main(tyro.cli(Options))
