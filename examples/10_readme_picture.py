"""README's picture from committed figures: quality on a language model, speed of a layer.

    python examples/10_readme_picture.py --out docs/figures/readme.png

Left: docs/figures/quality_llm.jsonl, mean of the draws. Right: docs/figures/layer_speed.json, each
implementation's time of BF16 over its own, measured in one run a row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from wush_jax.evaluation.bars import grouped_bars

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SETTINGS = {
    "rounding identity": "identity",
    "rounding hadamard": "hadamard",
    "rounding WUSH": "wush",
    "PAPER": "PAPER",
    "BEST": "BEST",
    "BEST_WIDE": "BEST_WIDE",
}
GROUPS = {"MXFP4": "", "NVFP4": "", "NVINT4": "", "MXFP4, FP8 inputs": " A8"}


@dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
      out: the picture.
    """

    out: Path = FIGURES / "readme.png"


def quality() -> dict[str, dict[str, float]]:
    """KL by format and setting, mean of the draws."""
    draws = defaultdict(list)
    for line in (FIGURES / "quality_llm.jsonl").read_text("utf8").splitlines():
        row = json.loads(line)
        draws[row["setting"]].append(row["kl"])
    found: dict[str, dict[str, float]] = {}
    for group, ending in GROUPS.items():
        fmt = group.partition(",")[0]
        for name, short in SETTINGS.items():
            if kl := draws.get(f"{fmt} {name}{ending}"):
                found.setdefault(group, {})[short] = float(np.mean(kl))
    return found


def main(options: Options) -> None:
    """Draw and write."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    grouped_bars(left, quality(), "KL to the float32 model (nats)")
    left.set_title("135M Llama: less is better", fontsize=10)
    left.legend(fontsize=7, ncols=2)
    speed = json.loads((FIGURES / "layer_speed.json").read_text("utf8"))
    markers = iter("os^vD")
    for name, by_tokens in speed["ratios"].items():
        tokens = [int(t) for t in by_tokens]
        right.plot(tokens, list(by_tokens.values()), marker=next(markers), label=name)
    right.axhline(1.0, color="black", lw=0.8)
    right.set_xscale("log", base=2)
    shown = sorted({int(t) for by_tokens in speed["ratios"].values() for t in by_tokens})
    right.set_xticks(shown, [str(t) for t in shown])
    right.set_xlabel("tokens")
    right.set_ylabel("times as fast as BF16")
    right.set_title(f"Layer (K, N) = {tuple(speed['shape'])}, {speed['device']}", fontsize=10)
    right.legend(fontsize=7)
    right.grid(alpha=0.3)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Options))
