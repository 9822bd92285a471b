"""Rounding a matrix to nearest, some rows at a time: the host holds few of them as floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.matrices import Matrix
from wush_jax.formats import Format, dequantize
from wush_jax.solvers.rtn import rtn
from wush_jax.solvers.site_transform import build_transform
from wush_jax.transforms import BlockTransform, apply_transform

ROWS_BYTES = 2**24  # of float32 that are rounded at once


class Scales:
    """Global scales from data, one for matrices of one site: found when they are asked for."""

    def __init__(self, matrices: Sequence[Matrix], values: Callable[[Matrix], list[np.ndarray]]):
        self._values, self._found = values, dict[Any, list[jax.Array]]()
        self._sites: dict[Any, list[Matrix]] = {}
        for matrix in matrices:
            self._sites.setdefault(matrix.site, []).append(matrix)

    def __call__(self, matrix: Matrix) -> list[jax.Array]:
        """Return the scale of each of a tensor's matrices."""
        fmt, count = matrix.recipe.format, matrix.shape[0] if len(matrix.shape) == 3 else 1
        if fmt.global_scale is not None:
            return [jnp.float32(fmt.global_scale)] * count
        if matrix.site not in self._found:
            tops = [
                [_largest(rows, pair_of(m)) for rows in self._values(m)]
                for m in self._sites[matrix.site]
            ]
            self._found[matrix.site] = [
                fmt.derive_global_scale(jnp.float32(max(each))) for each in zip(*tops, strict=True)
            ]
        return self._found[matrix.site]


def pair_of(matrix: Matrix) -> BlockTransform:
    """Return the transforms of a matrix's recipe, which look at no data."""
    return build_transform([], None, matrix.recipe)


def run_time(matrix: Matrix) -> np.ndarray:
    """Return T_X (d, d), or (E, d, d), on the host."""
    values = np.asarray(pair_of(matrix).activation)
    return np.ascontiguousarray(np.broadcast_to(values, (*matrix.shape[:-2], *values.shape)))


def _parts(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield some rows after the others as float32, filled with zeros to one shape: their number."""
    n, k = rows.shape
    step = min(n, max(1, ROWS_BYTES // (4 * k)))
    for start in range(0, n, step):
        part = np.asarray(rows[start : start + step], np.float32)
        yield len(part), np.pad(part, [(0, step - len(part)), (0, 0)])


def _largest(rows: np.ndarray, pair: BlockTransform) -> float:
    return max(float(_part_largest(part, pair)) for _, part in _parts(rows))


@jax.jit
def _part_largest(part, pair: BlockTransform):
    return jnp.max(jnp.abs(apply_transform(part, pair.weight)))


def round_matrix(rows: np.ndarray, matrix: Matrix, scale, tell: Callable[[int], None]) -> dict:
    """Return the arrays of a matrix (N, K) of a tensor, and its error and power."""
    pair, recipe = pair_of(matrix), matrix.recipe
    codes, scales, error, power = [], [], 0.0, 0.0
    for count, part in _parts(rows):
        quantized, finite, *sums = _round(
            part, pair, scale, fmt=recipe.format, scales=recipe.scale_search
        )
        if not finite:
            raise ValueError(
                f"tensor {matrix.tensor!r} has values that are not finite; fetch its file again, "
                "or leave it out by a rule"
            )
        # Copies: views of the device's memory would keep all of it.
        codes.append(np.array(quantized.codes[:count]))
        scales.append(np.array(quantized.scales[:count]))
        error, power = error + float(sums[0]), power + float(sums[1])
        tell(count * rows.shape[1])
    return {
        "codes": np.concatenate(codes),
        "scales": np.concatenate(scales),
        "global_scale": np.float32(scale),
        "error": np.array([error, power]),
    }


@partial(jax.jit, static_argnames=("fmt", "scales"))
def _round(part, pair: BlockTransform, scale, *, fmt: Format, scales: str):
    quantized = rtn(part, pair, fmt, scales=scales, global_scale=scale)
    moved = apply_transform(part, pair.weight)
    error = dequantize(quantized) - moved
    return quantized, jnp.isfinite(part).all(), jnp.sum(error**2), jnp.sum(moved**2)


def stacked(parts: list[dict], matrix: Matrix) -> dict[str, np.ndarray]:
    """Return the arrays of a tensor from those of its matrices."""
    error, power = np.sum([part.pop("error") for part in parts], axis=0)
    whole = (
        parts[0]
        if len(matrix.shape) == 2
        else {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    )
    return {**whole, "error": np.float64(error / power if power else 0.0)}
