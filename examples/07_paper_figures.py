"""The paper's figures 1, 4, 5 and 6, table 1, and predicted against measured loss: our functions.

Figures 4 and 6 are geometry, 1 is a toy of two channels; 5, the table and the comparison with the
theory are measured on the embedded model. Prints the tables of docs/figures.md and docs/numerics.md
and writes plots and JSON:

    python examples/07_paper_figures.py --out docs/figures
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from paper_tables import FORMATS, TRANSFORMS, show

import wush_jax as wush
from wush_jax import transforms
from wush_jax.calibration.model import quantize_with
from wush_jax.calibration.observe import capture_rows
from wush_jax.evaluation.study import grid
from wush_jax.formats.elements import E4M3
from wush_jax.layers.nnx import dense_layers
from wush_jax.models.demo import load_demo_model, stdlib_text, token_batches
from wush_jax.solvers.noise import relative_error
from wush_jax.solvers.site_transform import build_transform
from wush_jax.transforms import linalg


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      out: folder for JSON and plots.
      calibration_batches: of 4,096 tokens.
      layer: whose weights and inputs figure 5 shows, and whose decoder layer table 1.
    """

    out: Path = Path("docs/figures")
    calibration_batches: int = 4
    layer: str = "layers.3"


def toy_transforms(cov: jax.Array) -> dict[str, np.ndarray]:
    """Return T_X of figure 1 for white weights and inputs of covariance ``cov``."""
    eye, pair = jnp.eye(2), {"damping": 0.0}
    found = {
        "identity": wush.identity_transform(2),
        "Hadamard": wush.hadamard_transform(2),
        "calibrated Hadamard": transforms.calibrated_hadamard_transform(eye, cov, **pair),
        "whitening": transforms.whitening_transform(eye, cov, **pair),
        "WUS": wush.wush_transform(eye, cov, hadamard=False, **pair),
        "WUSH": wush.wush_transform(eye, cov, **pair),
    }
    return {name: np.asarray(t.activation, np.float64) for name, t in found.items()}


def toy_losses(cov: np.ndarray, built: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return ``E||T^-1 eps(T y)||^2 / var(eta)`` by both error models, y Gaussian."""
    y = np.random.default_rng(0).multivariate_normal(np.zeros(2), cov, 2**18)
    losses = {}
    for name, t in built.items():
        z, back = y @ t.T, np.linalg.inv(t)
        columns = (back**2).sum(0)
        fp = float((z**2 @ columns).mean())
        losses[name] = (fp, float((np.abs(z).max(1) ** 2).mean() * columns.sum()))
    return losses


def figure_1(path: Path) -> dict[str, tuple[float, float]]:
    """Draw what rounding may do to two points, in both spaces, by both error models."""
    turn = np.deg2rad(15.0)
    axes_2d = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    cov = axes_2d @ np.diag([1.0, 0.09]) @ axes_2d.T
    built = toy_transforms(jnp.asarray(cov, jnp.float32))
    losses = toy_losses(cov, built)
    points = np.array([[0.9, 0.25], [0.4, -0.5]])
    corners = 0.4 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    circle = np.stack([f(np.linspace(0, 2 * np.pi, 100)) for f in (np.cos, np.sin)], 1)
    ellipse = circle @ np.linalg.cholesky(cov).T
    figure = Figure(figsize=(8, 12), layout="constrained")
    panels = figure.subplots(len(built), 4)
    for row, (name, t) in zip(panels, built.items(), strict=True):
        row[0].set_ylabel(name)
        # one picture scale for all transforms: det T = 1
        t = t / np.sqrt(abs(np.linalg.det(t)))
        for axes, (model, moved) in zip(row, itertools.product((0, 1), (0, 1)), strict=True):
            space = t if moved else np.eye(2)
            axes.plot(*(ellipse @ space.T).T, "k-", lw=0.8)
            for point, color in zip(points, ("green", "limegreen"), strict=True):
                z = t @ point
                reach = np.abs(z) if model == 0 else np.full(2, np.abs(z).max())
                zone = point + (corners * reach) @ np.linalg.inv(t).T
                zone, centre = zone @ space.T, space @ point
                radius = np.sqrt(((zone - centre) ** 2).sum(1).mean() / 3)
                axes.add_patch(Polygon(zone, color=color, alpha=0.3, lw=0))
                axes.add_patch(Circle(centre, radius, fill=False, color=color))
                axes.plot(*centre, ".", color=color)
            axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[], aspect="equal")
            if not moved:
                axes.set_title(f"{'FP' if model == 0 else 'INT'} loss {losses[name][model]:.3f}")
    figure.savefig(path, dpi=50)
    return losses


def figure_4(path: Path) -> list[list[float]]:
    """Draw a Gaussian of two channels and its marginals, before and after Hadamard."""
    cov = np.array([[0.1, 0.02], [0.02, 0.5]])
    h = np.asarray(wush.hadamard_matrix(2), np.float64)
    grid_1d = np.linspace(-2, 2, 121)
    figure = Figure(figsize=(7, 6), layout="constrained")
    panels, variances = figure.subplots(2, 2), []
    for row, (name, m) in zip(
        panels, {"original": cov, "after Hadamard": h @ cov @ h.T}.items(), strict=True
    ):
        xy = np.stack(np.meshgrid(grid_1d, grid_1d), -1)
        density = np.exp(-0.5 * np.einsum("xyi,ij,xyj->xy", xy, np.linalg.inv(m), xy))
        row[0].contourf(grid_1d, grid_1d, density, cmap="Greens")
        row[0].set(title=f"joint, {name}", aspect="equal", xlabel="channel 1", ylabel="channel 2")
        marginals = [np.exp(-0.5 * grid_1d**2 / v) / np.sqrt(2 * np.pi * v) for v in np.diag(m)]
        for i, marginal in enumerate(marginals):
            row[1].plot(grid_1d, marginal, label=f"channel {i + 1}")
        row[1].plot(grid_1d, np.mean(marginals, axis=0), "k--", label="mean")
        row[1].set(title=f"marginals, {name}", ylim=(0, 1.4))
        variances.append(np.diag(m).tolist())
    panels[0, 1].legend()
    figure.savefig(path, dpi=60)
    return variances


def figure_5(weight: jax.Array, rows: jax.Array, path: Path) -> dict[str, list[float]]:
    """Draw magnitudes of a layer's weights and inputs, and each channel's root mean square."""
    shown, crests = 64, {}
    m_x = wush.second_moment(rows, 32)
    # few colours and sharp edges: a small file
    look = {"vmin": 0, "vmax": 4, "cmap": colormaps["viridis"].resampled(8), "aspect": "auto"}
    look["interpolation"] = "nearest"
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(2, 5)
    for column, name in enumerate(("identity", "random", "hadamard", "wus", "wush")):
        recipe = wush.Recipe(transform=name, transform_dtype="float32")
        pair = build_transform([weight], m_x, recipe)
        moved = (
            wush.apply_transform(weight, pair.weight),
            wush.apply_transform(rows, pair.activation),
        )
        for axes, label, x in zip(panels[:, column], ("weights", "inputs"), moved, strict=True):
            x = np.abs(np.asarray(x, np.float64))
            x = x / np.sqrt((x**2).mean())
            rms = np.sqrt((x**2).mean(0))
            axes.imshow(x[:shown, :shown], **look)
            over = axes.twinx()
            over.plot(rms[:shown], color="red", lw=0.8)
            over.set_ylim(0, 4)
            axes.set(xticks=[], yticks=[], title=f"{label}, {name}")
            groups = x.reshape(len(x), -1, 32)
            crest = groups.max(-1) / np.sqrt((groups**2).mean(-1))
            crests.setdefault(name, []).extend([float(rms.max() / rms.min()), float(crest.mean())])
    figure.savefig(path, dpi=55)
    return crests


def figure_6(path: Path) -> dict[str, float]:
    """Draw why floating-point codes are nearly uniform in the logarithm: 1 + x is nearly 2^x."""
    x = np.linspace(0, 1, 200)
    codes = np.arange(0x08, 0x7F)  # E4M3's positive normal numbers
    values = np.asarray(E4M3.decode(jnp.asarray(codes, jnp.uint8)), np.float64)
    straight = codes / 8.0 - 7.0
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, 1 + x, label="1 + x")
    left.plot(x, 2**x, label="2^x")
    left.set(title=f"largest difference {(1 + x - 2**x).max():.3f}", xlabel="x")
    right.plot(codes, np.log2(values), ".", ms=3, label="log2 of E4M3's value")
    right.plot(codes, straight, lw=0.8, label="code / 8 - 7")
    right.set(xlabel="code", xlim=(56, 80), ylim=(0, 3))
    right.set(title="floating-point codes are logarithms, almost")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=60)
    return {
        "1 + x - 2^x": float((1 + x - 2**x).max()),
        "log2 E4M3 - line": float((np.log2(values) - straight).max()),
    }


def predicted(weight: jax.Array, moment: jax.Array, recipe: wush.Recipe) -> tuple[float, float]:
    """Return eq. 1 as the two error models have it: errors of inputs and weights, independent.

    The power of the error per power of the value is `relative_error`. FP: each value has its own;
    INT: all of a block share it, ``1 / d`` of the block's each.
    """
    d, relative = recipe.block, relative_error(recipe.format)
    blocks = linalg.diagonal_blocks(moment, d)
    pair = build_transform([weight], blocks, recipe)
    m_w = wush.second_moment(weight, d)
    fp, whole = (
        float(jnp.sum(wush.predicted_loss(m_w, blocks, pair, model=model)))
        for model in ("fp", "int")
    )
    return 2 * relative * fp, 2 * relative * whole / d


def evaluation_batch() -> np.ndarray:
    return next(token_batches(stdlib_text("evaluation"), batch=16, length=256))


def one_layer(model: Any, options: Options) -> tuple[jax.Array, jax.Array]:
    """Return weight (N, K) and inputs (tokens, K) of the layer of figure 5."""
    dense, _ = dense_layers(model)
    path = next(p for p in dense if p.startswith(options.layer + ".") and "down" in p)
    rows = capture_rows(model, evaluation_batch(), {path: dense[path]})[path]
    return dense[path].weight, rows.reshape(-1, rows.shape[-1])


def layers(model: Any, options: Options) -> list[dict[str, Any]]:
    """Quantize every layer by RTN in every setting; return predicted and measured losses."""
    calibration = token_batches(
        stdlib_text("calibration"),
        batch=16,
        length=256,
        limit=options.calibration_batches,
        seed=0,
    )
    batch = evaluation_batch()
    plans = {
        name: wush.plan(model, recipe, batch)
        for name, recipe in grid(
            FORMATS, TRANSFORMS, base=wush.Recipe(share_transform=False)
        ).items()
    }
    dense, _ = dense_layers(model)
    sites = [item.site for item in next(iter(plans.values())).sites]
    known = wush.calibrate(model, calibration, rows=0)
    site_of = {path: site for site in sites for path in site.layers}
    found = []
    for name, planned in plans.items():
        print(name, flush=True)
        _, report = quantize_with(model, planned, known, batch)
        recipe = planned.sites[0].recipe
        for row in report.layers:
            fp, integer = predicted(
                dense[row.path].weight, known.of(site_of[row.path]).finalize(), recipe
            )
            found.append(
                {"format": recipe.format.name, "transform": recipe.transform, "layer": row.path}
                | {"loss": row.loss, "relative": row.relative_loss, "fp": fp, "int": integer}
            )
    return found


def plot_predictions(found: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(FORMATS), sharey=True)
    for axes, fmt in zip(panels, FORMATS, strict=True):
        model = "int" if fmt is wush.INT4 else "fp"
        for name in TRANSFORMS:
            rows = [r for r in found if (r["format"], r["transform"]) == (fmt.name, name)]
            power = np.array([r["loss"] / r["relative"] for r in rows])
            axes.loglog(
                np.array([r[model] for r in rows]) / power,
                [r["relative"] for r in rows],
                ".",
                label=name,
            )
        ends = np.array([6e-4, 0.3])
        axes.loglog(ends, ends, "k-", lw=0.6)
        axes.set(title=f"{fmt.name}, {model.upper()} model", xlabel="predicted loss / output power")
    panels[0].set_ylabel("measured loss / output power")
    panels[0].legend()
    figure.savefig(path, dpi=70)


def rounded(tree: Any) -> Any:
    """Keep six digits: a small file."""
    return jax.tree.map(lambda v: float(f"{v:.6g}") if isinstance(v, float) else v, tree)


def main(options: Options) -> None:
    """Draw, measure, print, write."""
    options.out.mkdir(parents=True, exist_ok=True)
    model = load_demo_model()
    found: dict[str, Any] = {
        "toy": figure_1(options.out / "paper_1_toy.png"),
        "marginals": figure_4(options.out / "paper_4_marginals.png"),
        "crests": figure_5(*one_layer(model, options), options.out / "paper_5_magnitudes.png"),
        "codes": figure_6(options.out / "paper_6_codes.png"),
        "layers": layers(model, options),
    }
    (options.out / "paper.json").write_text(json.dumps(rounded(found)) + "\n")
    plot_predictions(found["layers"], options.out / "predictions.png")
    show(found, options.layer)


if __name__ == "__main__":
    main(tyro.cli(Options))
