"""Transforms x solvers x formats x scale strategies on the embedded model, over calibration draws.

Prints one table, mean and spread over the draws, and writes every number as JSON:

    python examples/02_compare_settings.py --draws 3 --out settings.json
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import wush_jax as wush
from wush_jax.evaluation.study import Study, compare, grid
from wush_jax.models.demo import load_demo_model, stdlib_text, token_batches
from wush_jax.solvers.recipe import Recipe

TRANSFORMS = ("identity", "hadamard", "wus", "wush")


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      out: JSON file for all numbers.
      draws: random draws of calibration windows.
      calibration_tokens: per draw.
      evaluation_tokens: of held-out text, the same for every setting.
      only: settings whose name contains this text.
    """

    out: Path = Path("settings.json")
    draws: int = 3
    calibration_tokens: int = 65536
    evaluation_tokens: int = 32768
    only: str = ""


def settings(only: str) -> dict[str, Recipe]:
    """Return all recipes by name: the grid of the paper, then scale strategies on top of GPTQ."""
    formats = [wush.MXFP4, wush.NVFP4, wush.INT4]
    chosen = grid(formats, TRANSFORMS, ("rtn", "gptq"))
    strategies = {
        "MXFP4": {
            "x3.5": wush.MXFP4.replace(global_scale=3.5),
            "round_175": wush.MXFP4.replace(rule="round_175", global_scale=1.0),
            "ceil": wush.MXFP4.replace(rule="ceil", global_scale=1.0),
            "ocp_floor": wush.MXFP4.replace(rule="ocp_floor", global_scale=1.0),
        },
        "NVFP4": {
            "derived global": wush.NVFP4.replace(global_scale=None),
            "4/6": wush.NVFP4.replace(rule="four_over_six"),
            "3 candidates": wush.NVFP4.replace(rule="three_candidates"),
        },
    }
    for fmt in formats:
        for solver in ("rtn", "gptq"):
            base = Recipe(format=fmt, solver=solver)
            chosen[f"{fmt.name} {solver}-wush weight sweep"] = base.replace(scale_search="sweep")
            for name, activation in strategies.get(fmt.name, {}).items():
                recipe = base.replace(activation_format=activation)
                chosen[f"{fmt.name} {solver}-wush input {name}"] = recipe
    return {name: recipe for name, recipe in chosen.items() if only in name}


def show(studies: list[Study]) -> Table:
    """Return mean and spread over the draws, one row a setting."""
    table = Table(title=f"unquantized perplexity {studies[0].reference.perplexity:.4f}")
    for name in ("setting", "layer loss x 1e3", "KL x 1e3", "spread", "perplexity"):
        table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=True)
    for outcomes in zip(*(study.outcomes for study in studies), strict=True):
        kl = np.array([o.kl for o in outcomes]) * 1e3
        table.add_row(
            outcomes[0].name,
            f"{np.mean([o.layer_loss for o in outcomes]) * 1e3:.2f}",
            f"{kl.mean():.2f}",
            f"{kl.min():.2f} - {kl.max():.2f}",
            f"{np.mean([o.perplexity for o in outcomes]):.4f}",
        )
    return table


def main(options: Options) -> None:
    """Run every draw and print the table."""
    model = load_demo_model()
    window = {"batch": 16, "length": 256}
    per_batch = window["batch"] * window["length"]
    evaluation = list(
        token_batches(
            stdlib_text("evaluation"), limit=options.evaluation_tokens // per_batch, **window
        )
    )
    start = time.perf_counter()
    studies = []
    for draw in range(options.draws):
        calibration = token_batches(
            stdlib_text("calibration"),
            limit=options.calibration_tokens // per_batch,
            seed=draw,
            **window,
        )

        def step(name: str, draw: int = draw) -> None:
            print(f"{time.perf_counter() - start:6.0f} s  draw {draw}  {name}", flush=True)

        study = compare(model, settings(options.only), calibration, evaluation, step=step)
        studies.append(study)
        rows = [
            [
                {"name": o.name, "layer_loss": o.layer_loss, "kl": o.kl, "perplexity": o.perplexity}
                for o in s.outcomes
            ]
            for s in studies
        ]
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=120).print(show(studies))


if __name__ == "__main__":
    main(tyro.cli(Options))
