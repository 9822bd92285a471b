"""README's picture and that of docs/speed.md, from committed figures.

    python examples/10_readme_picture.py --out docs/figures
    python examples/10_readme_picture.py --measured matmul.json   # of the command below, first

Quality: docs/figures/quality_llm.jsonl, mean of the draws. Speed: docs/figures/layer_speed.json,
BF16's time over that of an implementation, measured in one run a row, by
`python -m pallas_kernels.benchmarks --matmul --output matmul.json`. Prints docs/speed.md's table.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

LAYER = "MXFP4 A4"
SHOWN = {
    LAYER: "W4A4 layer, MXFP4",
    "MXFP4 A8": "W4A8 layer, MXFP4 by FP8",
    "MXFP4 A4, default": 'W4A4, MXFP4, precision="default"',
    "NVFP4 A8, folded": 'W4A8, NVFP4, precision="folded"',
}
KINDS = {"a16": "A16", "a8": "A8", "a4": "A4", "fast": "A4, default", "folded": "A8, folded"}
EXACT = ("A16", "A8", "A4")
TABLE = {
    "MXFP4": (*EXACT, "A4, default"),
    "NVFP4": (*EXACT, "A8, folded"),
    "NVINT4": (*EXACT, "A8, folded"),
}
COLUMNS = [f"{fmt} {kind}" for fmt, kinds in TABLE.items() for kind in kinds]


@dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
      out: the folder of the pictures.
      measured: what a benchmark wrote, which takes the place of the committed ratios.
    """

    out: Path = FIGURES
    measured: Path | None = None


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


def speed() -> dict[str, Any]:
    """What was measured of layers: the times of BF16, and how many times as fast others are."""
    return json.loads((FIGURES / "layer_speed.json").read_text("utf8"))


def replaced(measured: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured, with the ratios of a benchmark's rows; each by BF16 of its own process."""
    layers: dict[tuple, dict[str, Any]] = {}

    def order(row):
        return [*TABLE].index(row["format"])

    for row in sorted((r for r in rows if r["format"] in TABLE), key=order):
        at = row["k"], row["n"], row["tokens"]
        layer = layers.setdefault(
            at, {"shape": [*at[:2]], "tokens": at[2], "bf16_us": round(row["bf16_us"], 1)}
        )
        layer |= {
            f"{row['format']} {kind}": round(row["bf16_us"] / row[f"{name}_us"], 2)
            for name, kind in KINDS.items()
            if f"{name}_us" in row
        }
    return {**measured, "layers": list(layers.values())}


def written(measured: dict[str, Any]) -> str:
    """JSON with a line for each layer."""
    lines = ",\n  ".join(json.dumps(layer) for layer in measured["layers"])
    head = json.dumps({k: v for k, v in measured.items() if k != "layers"}, indent=1)
    return f'{head[:-2]},\n "layers": [\n  {lines}\n ]\n}}\n'


def table(measured: dict[str, Any]) -> str:
    """The table of docs/speed.md."""
    names = [
        f"{fmt}: {kind}" if kind == kinds[0] else kind
        for fmt, kinds in TABLE.items()
        for kind in kinds
    ]
    head = ["(K, N)", "M", "BF16", *names]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head))]
    for row in measured["layers"]:
        ratios = [f"{row[name]:.2f}x" if name in row else "" for name in COLUMNS]
        ratios[COLUMNS.index(LAYER)] = f"**{ratios[COLUMNS.index(LAYER)]}**"
        first = [str(tuple(row["shape"])), str(row["tokens"]), f"{row['bf16_us']:.1f} us"]
        lines.append(f"| {' | '.join([*first, *ratios])} |")
    return "\n".join(lines)


def over_tokens(axes: Any, measured: dict[str, Any], shape: list[int], peers: bool) -> None:
    """Draw how many times as fast as BF16 a layer is, by tokens."""
    rows = [row for row in measured["layers"] if row["shape"] == shape]
    lines = {
        label: {row["tokens"]: row[name] for row in rows if name in row}
        for name, label in SHOWN.items()
    }
    if peers:
        lines |= {n: {int(t): x for t, x in r.items()} for n, r in measured["peers"].items()}
    for marker, (label, ratios) in zip("os^vDP", lines.items(), strict=False):
        axes.plot(list(ratios), list(ratios.values()), marker=marker, label=label)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    tokens = [row["tokens"] for row in rows]
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as BF16")
    axes.set_title(f"Layer (K, N) = {tuple(shape)}, {measured['device']}", fontsize=10)
    axes.grid(alpha=0.3)


def main(options: Options) -> None:
    """Draw and write both."""
    measured = speed()
    if options.measured is not None:
        measured = replaced(measured, json.loads(options.measured.read_text("utf8")))
        (FIGURES / "layer_speed.json").write_text(written(measured), "utf8")
    print(table(measured))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    grouped_bars(left, quality(), "KL to the float32 model (nats)")
    left.set_title("135M Llama, WikiText-2: less is better", fontsize=10)
    left.legend(fontsize=7, ncols=2)
    over_tokens(right, measured, measured["peers_shape"], peers=True)
    right.legend(fontsize=7)
    figure.savefig(options.out / "readme.png", dpi=130)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in measured["layers"]))
    for axes, shape in zip(figure.subplots(2, 2, sharey=True).flat, shapes, strict=True):
        over_tokens(axes, measured, list(shape), peers=False)
        handles = axes.get_legend_handles_labels()
    figure.legend(*handles, ncols=4, fontsize=8, loc="outside upper center")
    figure.savefig(options.out / "speed.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Options))
