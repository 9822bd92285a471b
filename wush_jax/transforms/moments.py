"""Second moments of the inputs of a site: block-diagonal or full, streamed and mergeable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats.checks import check_arrays, check_kind, check_whole, refuse_tensors
from wush_jax.transforms import linalg
from wush_jax.transforms.checks import check_finite
from wush_jax.transforms.sample import SAMPLE_ROWS, Sample

# Into how many parts rows are split before they are summed: the most devices that give the same
# bits as one.
PARTS = 8
# Tokens whose products a CPU sums at once: as they lie, without a transposed copy of all.
TOGETHER = 64
# Fewer rows of a moment are not worth a product of their own.
PANEL = 128


def second_moment(x: jax.Array, block: int | None = None, *, name: str = "x") -> jax.Array:
    """Return the second moment over all leading axes: ``M = sum_t x_t x_t^T / T``.

    Of activations (..., K) it is M_X; of weights (N, K) it is M_W.

    Args:
      x: (..., K).
      block: block size d for the diagonal blocks only; None for the full matrix.
      name: what errors call x.

    Returns:
      float32 (K, K), or (K/d, d, d); products at the highest precision.

    Raises:
      ValueError: x is a scalar or has no rows, the block does not divide K, or the moment is not
        finite: x is not, or its squares overflow float32 (outside jit).

    Source: WUSH paper, eq. 4.

    >>> second_moment(jnp.float32([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[5.0, 7.0], [7.0, 10.0]]
    """
    _check_block(block)
    rows = _rows(x, name)
    moment = _gram(rows, block) / rows.shape[0]
    check_finite(f"the second moment of {name}", moment)
    return moment


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """A running second moment: a pytree, so it can live in a scan, a jit or on a mesh.

    ``mean = sum_t x_t x_t^T / count``. Keeping the mean, not the sum, keeps float32 accurate for
    any number of tokens.

    Attributes:
      mean: float32 (K, K) or (K/d, d, d).
      count: int32 scalar, tokens seen.
      largest: float32 scalar, the largest magnitude of any value seen.
      sample: some of the rows themselves, or None.

    >>> m = Moments.init(4, block=2).update(jnp.ones((3, 4))).update(jnp.zeros((1, 4)))
    >>> m.finalize()[0].tolist()
    [[0.75, 0.75], [0.75, 0.75]]
    """

    mean: jax.Array
    count: jax.Array
    largest: jax.Array
    sample: Sample | None = None

    @classmethod
    def init(
        cls, size: int, block: int | None = None, rows: int = 0, *, weighted: bool = False
    ) -> Moments:
        """Return empty moments of K = ``size`` channels, full or in blocks of ``block``.

        With ``rows`` a sample of that many rows is kept beside them, ``weighted`` with the weights
        of their tokens.
        """
        check_whole(size=size, rows=rows)
        _check_block(block)
        if rows < 0:
            raise ValueError(f"rows={rows}; give the number of tokens to keep, 0 for none")
        if size < 1 or (block is not None and (block < 1 or size % block)):
            raise ValueError(f"block={block} does not divide size={size}; choose a divisor")
        shape = (size, size) if block is None else (size // block, block, block)
        sample = Sample.init(size, rows, weighted=weighted) if rows else None
        zero = jnp.zeros((), jnp.float32)
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros((), jnp.int32), zero, sample)

    @property
    def block(self) -> int | None:
        """Block size d, or None for a full moment."""
        return None if self.mean.ndim == 2 else self.mean.shape[-1]

    def update(
        self, x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
    ) -> Moments:
        """Return the moments with the tokens of ``x`` (..., K) added.

        Args:
          x: (..., K).
          mask: bool (...), which tokens count; None for all. What it leaves out, padding, may be
            anything.
          weights: (...), how much tokens count beside the others of ``x``: only ratios matter, so
            that ``x`` as a whole counts by its number of tokens. None, or zeros: all alike.

        >>> padded = jnp.float32([[1, 1], [9, 9]])
        >>> Moments.init(2).update(padded, jnp.array([True, False])).finalize().tolist()
        [[1.0, 1.0], [1.0, 1.0]]
        """
        check_arrays(x=x)
        k = self.mean.shape[-1] * (1 if self.block is None else self.mean.shape[-3])
        if x.ndim > 1 and x.shape[-1] != k:
            own = (x.shape[-1],) * 2
            raise ValueError(f"x has a moment of {own}, expected {(k, k)}: give x as (..., {k})")
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        rows = _rows(x)
        largest = jnp.max(jnp.abs(rows)).astype(jnp.float32)
        count = jnp.int32(rows.shape[0]) if mask is None else jnp.sum(mask, dtype=jnp.int32)
        if weights is not None:
            weights = _of_mean_one(weights.reshape(-1), mask, count)
            rows = jnp.sqrt(weights)[:, None] * rows.astype(jnp.float32)
        mean = _gram(rows, self.block) / jnp.maximum(count, 1).astype(jnp.float32)
        batch = Moments(mean, count, largest)
        sample = None if self.sample is None else self.sample.update(x, mask, weights)
        return replace(self.merge(batch), sample=sample)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both streams together: count-weighted mean."""
        check_kind(Moments, "Moments", other=other)
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other has shape {other.mean.shape}, expected {self.mean.shape}")
        count = self.count + other.count
        share = other.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)
        sample = self.sample
        if sample is not None and other.sample is not None:
            sample = sample.merge(other.sample)
        largest = jnp.maximum(self.largest, other.largest)
        return Moments(self.mean + (other.mean - self.mean) * share, count, largest, sample)

    def finalize(self) -> jax.Array:
        """Return the second moment.

        Raises:
          ValueError: no token was seen, or a value was not finite (outside jit).
        """
        if not isinstance(self.count, jax.core.Tracer) and int(self.count) == 0:
            raise ValueError("moments are empty: no calibration token was seen; pass some batches")
        check_finite("moments", self.mean)
        return self.mean


def calibrate_layer(
    x: jax.Array | Iterable[jax.Array], *, rows: int = SAMPLE_ROWS, block: int | None = None
) -> Moments:
    """Return what `wush_jax.quantize_weight` needs to know of a layer's input, from the input.

    ``M_X = sum_t x_t x_t^T / T`` over all tokens t, and a sample of the tokens themselves.

    Args:
      x: (..., K), or an iterable of such arrays, read once; those of one shape compile once.
      rows: tokens to keep; 2048 is enough for every recipe, 0 keeps none and serves those without
        ``block_gain`` and ``input_error="sample"``.
      block: block size d for the diagonal blocks of M_X only, which rounding to nearest with that
        ``block_size`` takes; None for all of it, which serves every recipe.

    Returns:
      `Moments`: ``.finalize()`` is M_X, ``.sample`` the tokens.

    Raises:
      ValueError: no array or no token, arrays that differ in K, values that are not finite, a block
        that does not divide K.

    Source: WUSH paper, eq. 4.

    >>> from wush_jax import BEST, quantize_weight
    >>> x = jax.random.normal(jax.random.key(0), (256, 64))
    >>> moments = calibrate_layer(x, rows=128)
    >>> moments.finalize().shape, moments.sample.rows.shape, int(moments.count)
    ((64, 64), (128, 64), 256)
    >>> quantize_weight(jnp.eye(64), moments, BEST.replace(descent=0, refit=0)).shape
    (64, 64)
    """
    check_whole(rows=rows)
    _check_block(block)
    if rows < 0:
        raise ValueError(f"rows={rows}; give the number of tokens to keep, 0 for none")
    moments: Moments | None = None
    k = 0
    refuse_tensors(x=x)
    if not isinstance(x, Iterable) or isinstance(x, str | bytes | Mapping):
        raise ValueError(f"x is a {type(x).__name__}; give an array (..., K), or several")
    parts: Iterable[Any] = [x] if hasattr(x, "shape") else x
    for index, part in enumerate(parts):
        check_arrays(**{f"x[{index}]": part})
        shape = jnp.shape(part)
        if len(shape) < 2 or 0 in shape or (moments is not None and shape[-1] != k):
            wanted = "K" if moments is None else f"K={k}, as before"
            raise ValueError(f"x[{index}] has shape {shape}; it must be (..., {wanted}), not empty")
        if moments is None:
            k = shape[-1]
            moments = Moments.init(k, block, rows)
        moments = _updated(moments, part)
        check_finite(f"the second moment up to x[{index}]", moments.mean)
    if moments is None:
        raise ValueError("x holds no array; pass one (..., K), or several")
    return moments


_updated = jax.jit(Moments.update)


def _of_mean_one(weights: jax.Array, mask: jax.Array | None, count: jax.Array) -> jax.Array:
    """Weights (T,) over their mean; those of the tokens that count alone; ones where all are 0."""
    weights = weights.astype(jnp.float32)
    if mask is not None:
        weights = jnp.where(mask.reshape(-1), weights, 0)
    total = jnp.sum(weights)
    mean = total / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(mean > 0, weights / jnp.where(mean > 0, mean, 1.0), 1.0)


def _check_block(block: int | None) -> None:
    if block is not None:
        check_whole(block=block)


def _rows(x: jax.Array, name: str = "x") -> jax.Array:
    check_arrays(**{name: x})
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}; it must be (..., K) with at least one row")
    if x.dtype in (jnp.bfloat16, jnp.float16):
        # Rounded as the layer reads it, which compilers may leave out on the way to float32.
        bits = jnp.finfo(x.dtype)
        x = lax.reduce_precision(x.astype(jnp.float32), bits.nexp, bits.nmant).astype(x.dtype)
    return x.reshape(-1, x.shape[-1])


def _gram(rows: jax.Array, block: int | None) -> jax.Array:
    """``sum_t x_t x_t^T`` of (T, K) in float32, full or diagonal blocks.

    The same bits whether the rows lie on one device or in equal shares on 2, 4 or 8: products are
    of an eighth of the rows wherever that divides, and float64 adds eight float32 numbers without
    rounding, in any order, unless they differ by 2^26 and more.
    """
    k = rows.shape[-1]
    # bfloat16 products are exact in the float32 accumulator; anything wider needs HIGHEST.
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        rows = rows.astype(jnp.float32)
    parts = rows.reshape(math.gcd(len(rows), PARTS), -1, k)
    if block is None:
        # Some rows of a large result at a time: those of all parts take no more memory than it.
        high = k // math.gcd(k, PARTS) if k >= PARTS * PANEL else k

        def some(start: jax.Array) -> jax.Array:
            columns = lax.dynamic_slice_in_dim(parts, start, high, axis=-1)
            return _sum_parts("pti,ptj->pij", columns, parts)

        return lax.map(some, jnp.arange(0, k, high, dtype=jnp.int32)).reshape(k, k)
    if block < 1 or k % block:
        raise ValueError(f"block={block} does not divide K={k} of x {rows.shape}")
    blocks = parts.reshape(*parts.shape[:2], k // block, block)
    if blocks.shape[1] < 2 * TOGETHER:
        return _exact_sum(_of_blocks(blocks))
    return _exact_sum(lax.platform_dependent(blocks, cpu=_in_chunks, default=_of_blocks))


def _of_blocks(blocks: jax.Array) -> jax.Array:
    """Return the products (P, B, d, d) of blocks (P, T, B, d), summed over T."""
    return _products("ptbi,ptbj->pbij", blocks, blocks)


def _in_chunks(blocks: jax.Array) -> jax.Array:
    """As `_of_blocks`, some tokens after the others."""
    steps, left = divmod(blocks.shape[1], TOGETHER)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
        some = lax.dynamic_slice_in_dim(blocks, left + step * TOGETHER, TOGETHER, axis=1)
        return total + _of_blocks(some)

    return lax.fori_loop(1, steps, add, _of_blocks(blocks[:, : TOGETHER + left]))


def _products(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    options: dict[str, Any] = {"precision": linalg.HIGHEST, "preferred_element_type": jnp.float32}
    return jnp.einsum(equation, a, b, **options)


def _sum_parts(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the float32 products of parts, summed over the parts in float64, as float32."""
    return _exact_sum(_products(equation, a, b))


@linalg.float64_construction
@jax.jit
def _exact_sum(parts: jax.Array) -> jax.Array:
    return jnp.sum(parts, axis=0)
