"""How accurate the construction of WUSH is, and how well the paper's error models fit real formats.

Prints the tables of docs/numerics.md, and writes every number as JSON and two plots:

    python examples/06_numerics_report.py --out docs/figures
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

import wush_jax as wush
from wush_jax.formats import FORMATS
from wush_jax.transforms import linalg

CONDITIONS = 10.0 ** np.arange(0, 13, 2)
DAMPINGS = 10.0 ** np.arange(-6, 0)
# Below the relative step of bfloat16, 2^-8, which run-time transforms are rounded to anyway.
SAFE = 1e-3


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      out: folder for JSON and plots.
      d: block size.
      draws: random pairs of moments per condition number.
      groups: random groups per format and distribution.
    """

    out: Path = Path("docs/figures")
    d: int = 32
    draws: int = 20
    groups: int = 8192


def random_moments(rng: np.random.Generator, d: int, condition: float, draws: int) -> np.ndarray:
    """Return (draws, d, d) float32: geometric eigenvalues from 1 to 1 / condition, random axes."""
    axes = np.linalg.qr(rng.standard_normal((draws, d, d)))[0]
    return ((axes * np.geomspace(1, 1 / condition, d)) @ axes.swapaxes(-1, -2)).astype(np.float32)


def by_svd(m_w: jax.Array, m_x: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return T_X and T_W as the library builds them, in whatever precision the moments have."""
    left, s, right = linalg.spectral_factors(linalg.damp(m_w, damping), linalg.damp(m_x, damping))
    h, root = jnp.asarray(linalg.hadamard_numpy(m_w.shape[-1]), s.dtype), s[..., None] ** -0.5
    return linalg.matmul(h, root * left), linalg.matmul(h, root * right)


def by_eigh(m_w: jax.Array, m_x: jax.Array, damping: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the same from the eigenvalues S^2 of W'^T M_X W', and T_W by inverting T_X."""

    def one(m_w, m_x):
        w = jnp.linalg.cholesky(m_w)
        squares, u = jnp.linalg.eigh(linalg.matmul(w.mT, linalg.matmul(m_x, w)))
        h = jnp.asarray(linalg.hadamard_numpy(m_w.shape[-1]), w.dtype)
        t = linalg.matmul(h, squares[..., None] ** -0.25 * linalg.matmul(u.mT, w.mT))
        return t, jnp.linalg.inv(t).mT

    return linalg.map_blocks(one, linalg.damp(m_w, damping), linalg.damp(m_x, damping))


CONSTRUCTIONS = {
    "float64, SVD (library)": linalg.float64_construction(jax.jit(by_svd)),
    "float32, SVD": jax.jit(by_svd),
    "float32, eigh": jax.jit(by_eigh),
}


def quality(pair: Any, m_w: np.ndarray, m_x: np.ndarray, damping: float) -> dict[str, Any]:
    """Return how far ``T_X T_W^T`` is from I and T_X from the optimum: the worst finite draw."""
    t_x, t_w = (np.asarray(t, np.float64) for t in pair)
    m_w, m_x = (damp64(m, damping) for m in (m_w, m_x))
    finite = np.isfinite(t_x).all((-1, -2)) & np.isfinite(t_w).all((-1, -2))
    result: dict[str, Any] = {"failed": float(1 - finite.mean()), "inverse": None, "excess": None}
    if not finite.any():
        return result
    t_x, t_w, m_w, m_x = (a[finite] for a in (t_x, t_w, m_w, m_x))
    eye = np.eye(t_x.shape[-1])
    result["inverse"] = float(np.abs(t_x @ t_w.swapaxes(-1, -2) - eye).max())
    partner = np.linalg.inv(t_x).swapaxes(-1, -2)
    a = np.einsum("nij,njk,nik->ni", t_x, m_x, t_x)
    b = np.einsum("nij,njk,nik->ni", partner, m_w, partner)
    roots = [np.linalg.cholesky(m) for m in (m_w, m_x)]
    s = np.linalg.svd(roots[0].swapaxes(-1, -2) @ roots[1], compute_uv=False)
    result["excess"] = float(((a * b).sum(-1) * len(eye) / s.sum(-1) ** 2 - 1).max())
    return result


def damp64(m: np.ndarray, damping: float) -> np.ndarray:
    m = m.astype(np.float64)
    return m + damping * np.trace(m, axis1=1, axis2=2)[:, None, None] / m.shape[-1] * np.eye(
        m.shape[-1]
    )


def constructions(options: Options) -> list[dict[str, Any]]:
    """Measure every construction over condition numbers and dampings."""
    rng, rows = np.random.default_rng(0), []
    for condition in CONDITIONS:
        pair = [random_moments(rng, options.d, condition, options.draws) for _ in range(2)]
        for damping in DAMPINGS:
            for name, build in CONSTRUCTIONS.items():
                built = build(*pair, jnp.float32(damping))
                found = quality(built, *pair, float(np.float32(damping)))
                rows.append({"name": name, "condition": condition, "damping": damping} | found)
    return rows


def roundings(options: Options) -> list[dict[str, float]]:
    """Round T_X to bfloat16: with T_W as it was, and with the inverse of what T_X became."""
    rng, rows = np.random.default_rng(1), []
    for condition in CONDITIONS:
        pair = [random_moments(rng, options.d, condition, options.draws) for _ in range(2)]
        exact = wush.wush_transform(*pair)
        rounded = exact.astype(jnp.bfloat16)
        row = {"condition": condition}
        for name, partner in {"library": rounded.weight, "T_W kept": exact.weight}.items():
            both = (rounded.activation, partner)
            row[name] = quality(both, *pair, float(np.float32(1e-2)))["inverse"]
        built = CONSTRUCTIONS["float64, SVD (library)"](*pair, 1e-2)[0]
        row["wush_transform - by_svd"] = float(jnp.max(jnp.abs(exact.activation - built)))
        rows.append(row)
    return rows


def error_models(options: Options) -> list[dict[str, Any]]:
    """Measure rounding errors: against the values, and against each group's largest magnitude."""
    key, rows = jax.random.key(0), []
    edges = 2.0 ** np.linspace(-6, 0, 25)
    for name, fmt in FORMATS.items():
        shape = (options.groups, fmt.group_size)
        drawn = {
            "uniform": jax.random.uniform(key, shape, minval=-1.7, maxval=1.7),
            "Gaussian": jax.random.normal(key, shape),
            "Laplace": jax.random.laplace(key, shape),
            "Student t, 3": jax.random.t(key, 3.0, shape),
        }
        row: dict[str, Any] = {"format": name, "to value": {}, "to amax": {}}
        for distribution, z in drawn.items():
            e = np.asarray(wush.fake_quantize(z, fmt) - z, np.float64)
            z = np.asarray(z, np.float64)
            amax = np.abs(z).max(-1, keepdims=True)
            row["to value"][distribution] = float((e**2).sum() / (z**2).sum())
            row["to amax"][distribution] = float((e**2).mean() / (amax**2).mean())
            if distribution == "Gaussian":
                share, size = (np.abs(z) / amax).ravel(), ((e / amax) ** 2).ravel()
                count, power = (np.histogram(share, edges, weights=w)[0] for w in (None, size))
                row["share"] = np.sqrt(edges[1:] * edges[:-1]).tolist()
                row["rms"] = np.sqrt(power / np.maximum(count, 1)).tolist()
        row["slope"] = slope(row["share"], row["rms"])
        rows.append(row)
    return rows


def slope(share: list[float], rms: list[float]) -> float:
    """Return d log(rms error) / d log|z| over the upper three octaves: 1 by FP's model, 0 by INT's.

    An octave is one turn of a floating-point format's saw tooth, so whole octaves are compared.
    """
    octave = np.sqrt(np.mean(np.square(np.asarray(rms)[-12:].reshape(3, 4)), axis=1))
    return float((np.log2(octave[-1]) - np.log2(octave[0])) / 2)


def spread(values: dict[str, float]) -> float:
    return max(values.values()) / min(values.values())


def plot_constructions(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(CONSTRUCTIONS), sharey=True)
    for axes, name in zip(panels, CONSTRUCTIONS, strict=True):
        chosen = [r for r in rows if r["name"] == name]
        grid = np.array([np.inf if r["failed"] else r["inverse"] for r in chosen])
        grid = np.log10(grid.reshape(len(CONDITIONS), len(DAMPINGS)))
        image = axes.imshow(
            np.where(np.isfinite(grid), grid, np.nan),
            vmin=-7,
            vmax=0,
            cmap="RdYlGn_r",
            origin="lower",
        )
        axes.set_facecolor("black")
        axes.set_xticks(range(len(DAMPINGS)), [f"{d:.0e}" for d in DAMPINGS], fontsize=7)
        axes.set_yticks(range(len(CONDITIONS)), [f"{c:.0e}" for c in CONDITIONS], fontsize=7)
        axes.set_title(name)
        axes.set_xlabel("damping")
    panels[0].set_ylabel("condition number of both moments")
    figure.colorbar(image, ax=panels, label="log10 max |T_X T_W^T - I|; black: not finite")
    figure.savefig(path, dpi=80)


def plot_error_models(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    for axes, row in zip(panels, rows, strict=False):
        share = np.asarray(row["share"])
        axes.loglog(share, row["rms"], "k.-", label="measured")
        value = np.sqrt(row["to value"]["Gaussian"])
        axes.loglog(share, value * share, "tab:blue", label="FP model")
        axes.axhline(np.sqrt(row["to amax"]["Gaussian"]), color="tab:red", label="INT model")
        axes.set_title(f"{row['format']}: slope {row['slope']:.2f}", fontsize=9)
        axes.set_xlabel("|z| / amax of the group", fontsize=8)
    panels[0].set_ylabel("rms error / amax", fontsize=8)
    panels[4].set_ylabel("rms error / amax", fontsize=8)
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=80)


def show(found: dict[str, Any]) -> None:
    """Print all as Markdown."""
    for name in CONSTRUCTIONS:
        print(f"\n{name}: max |T_X T_W^T - I| over the draws; in brackets the share that failed\n")
        print("| condition \\ damping |", *(f"{d:.0e} |" for d in DAMPINGS))
        for condition in CONDITIONS:
            cells = [
                f"failed ({r['failed']:.0%})" if r["failed"] else f"{r['inverse']:.0e}"
                for r in found["constructions"]
                if (r["name"], r["condition"]) == (name, condition)
            ]
            print(f"| {condition:.0e} |", " | ".join(cells), "|")
    print(f"\ncells where every draw is finite and |T_X T_W^T - I| < {SAFE:g}")
    for name in CONSTRUCTIONS:
        cells = [r for r in found["constructions"] if r["name"] == name]
        safe = [r for r in cells if not r["failed"] and r["inverse"] < SAFE]
        excess = max(r["excess"] for r in safe)
        print(f"| {name} | {len(safe)} of {len(cells)} | excess loss in these {excess:.1e} |")
    print("\nT_X in bfloat16, damping 1e-2: max |T_X T_W^T - I|")
    for row in found["bfloat16"]:
        print(f"| {row['condition']:.0e} | {row['library']:.1e} | {row['T_W kept']:.1e} |")
    same = max(row["wush_transform - by_svd"] for row in found["bfloat16"])
    print(f"\nlargest difference of wush_transform and the float64 construction: {same:g}")
    print("\nformat | E e^2 / E z^2 by distribution | spread | E e^2 / E amax^2, spread | slope")
    for row in found["error models"]:
        value = " | ".join(f"{v:.3g}" for v in row["to value"].values())
        amax = f"{spread(row['to value']):.2f} | {spread(row['to amax']):.2f}"
        print(f"| {row['format']} | {value} | {amax} | {row['slope']:.2f} |")


def main(options: Options) -> None:
    """Measure, print, write."""
    options.out.mkdir(parents=True, exist_ok=True)
    found = {
        "constructions": constructions(options),
        "bfloat16": roundings(options),
        "error models": error_models(options),
    }
    show(found)
    (options.out / "numerics.json").write_text(json.dumps(found) + "\n")
    plot_constructions(found["constructions"], options.out / "construction.png")
    plot_error_models(found["error models"], options.out / "error_models.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
