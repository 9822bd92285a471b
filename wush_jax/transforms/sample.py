"""A few rows of a stream of activations, kept so that the rare large ones are never missed.

A second moment says nothing about single tokens; what a quantizer does to the few tokens that carry
most of a channel's power (BOS-like, "massive" ones) has to be seen on the tokens themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from wush_jax.formats.checks import check_arrays, check_whole

# Rows of a site's input that are kept for recipes that look at single tokens: enough for the error
# moments of blocks of 128, and for eight gains to be told apart.
SAMPLE_ROWS = 2048


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample:
    """A priority sample of rows: a pytree of fixed size, mergeable.

    Row x of size ``w = max_i |x_i|`` gets the priority ``w / u`` with u uniform in (0, 1]; the S
    rows of highest priority stay. With tau the highest priority that had to go,

        ``sum over all rows of f(x)  is estimated without bias by  sum over kept max(1, tau / w) f``

    so rows larger than tau are all there, each counted once. Where tokens have weights a, the means
    are of ``a f``, and ``w = sqrt(a) max_i |x_i|``.

    Attributes:
      rows: float32 (S, K); zeros where fewer rows came.
      priority: float32 (S,); 0 where fewer rows came.
      threshold: tau, float32 scalar; 0 until a row had to go.
      count: int32 scalar, rows seen; also what the random numbers hang on.
      importance: weights a of the rows' tokens, float32 (S,); None where all tokens count alike.

    Source: priority sampling, Duffield, Lund, Thorup (2007).

    >>> s = Sample.init(4, 2).update(jnp.ones((1, 4))).update(jnp.zeros((1, 4)))
    >>> s.rows.shape, s.weights.tolist()
    ((2, 4), [0.5, 0.0])
    """

    rows: jax.Array
    priority: jax.Array
    threshold: jax.Array
    count: jax.Array
    importance: jax.Array | None = None

    @classmethod
    def init(cls, size: int, rows: int, *, weighted: bool = False) -> Sample:
        """Return an empty sample of at most ``rows`` rows of K = ``size`` channels.

        With ``weighted`` its tokens have weights.
        """
        check_whole(size=size, rows=rows)
        if size < 1 or rows < 0:
            raise ValueError(f"size={size}, rows={rows}; give K channels and how many rows to keep")
        zero = jnp.zeros((), jnp.float32)
        return cls(
            jnp.zeros((rows, size), jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            zero,
            jnp.zeros((), jnp.int32),
            jnp.ones((rows,), jnp.float32) if weighted else None,
        )

    @classmethod
    def of(cls, x: jax.Array) -> Sample:
        """Return all rows of x (..., K) as a sample.

        >>> Sample.of(jnp.ones((2, 3, 4))).rows.shape
        (6, 4)
        """
        check_arrays(x=x)
        if x.ndim < 1 or x.size == 0:
            raise ValueError(f"x has shape {x.shape}; it must be (..., K), not empty")
        rows = x.reshape(-1, x.shape[-1])
        return cls.init(rows.shape[-1], rows.shape[0]).update(rows)

    def update(
        self, x: jax.Array, mask: jax.Array | None = None, weights: jax.Array | None = None
    ) -> Sample:
        """Return the sample with the rows of x (..., K) added: all, or those of ``mask`` (...).

        ``weights`` (...) are those of the tokens, of mean one; None counts them alike.

        Raises:
          ValueError: weights, and a sample that keeps none.
        """
        if weights is not None and self.importance is None:
            raise ValueError("weights: this sample keeps none; make it with weighted=True")
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        count = jnp.int32(rows.shape[0])
        if mask is not None:  # rows of zeros are never kept
            mask = mask.reshape(-1)
            rows, count = jnp.where(mask[:, None], rows, 0), jnp.sum(mask, dtype=jnp.int32)
        key = jax.random.fold_in(jax.random.key(0), self.count)
        # In (0, 1], so that the priority is finite.
        uniform = 1.0 - jax.random.uniform(key, rows.shape[:1], jnp.float32)
        zero = jnp.zeros((), jnp.float32)
        own = None
        if self.importance is not None:
            own = jnp.ones(len(rows)) if weights is None else weights.reshape(-1)
            own = own.astype(jnp.float32)
        # A row with NaN, which a maximum may pass over, stays in any case, so that it is seen.
        size = jnp.where(jnp.any(jnp.isnan(rows), axis=-1), jnp.inf, _size(rows, own))
        return self.merge(Sample(rows, size / uniform, zero, count, own))

    def merge(self, other: Sample) -> Sample:
        """Return the sample of both streams together, of this one's size."""
        kept = self.rows.shape[0]
        rows = jnp.concatenate([self.rows, other.rows])
        priority = jnp.concatenate([self.priority, other.priority])
        ranked, order = jax.lax.top_k(priority, min(kept + 1, len(priority)))
        threshold = jnp.maximum(self.threshold, other.threshold)
        if len(ranked) > kept:
            threshold = jnp.maximum(threshold, ranked[kept])
        importance = None
        if self.importance is not None and other.importance is not None:
            importance = jnp.concatenate([self.importance, other.importance])[order[:kept]]
        count = self.count + other.count
        return Sample(rows[order[:kept]], ranked[:kept], threshold, count, importance)

    @property
    def weights(self) -> jax.Array:
        """Weights (S,) of the rows in means over all rows seen: ``a max(1, tau / w) / count``."""
        size = _size(self.rows, self.importance)
        weights = jnp.maximum(1.0, self.threshold / jnp.where(size > 0, size, jnp.inf))
        if self.importance is not None:
            weights *= self.importance
        return jnp.where(size > 0, weights, 0.0) / jnp.maximum(self.count, 1).astype(jnp.float32)


def _size(rows: jax.Array, importance: jax.Array | None) -> jax.Array:
    size = jnp.max(jnp.abs(rows), axis=-1)
    return size if importance is None else size * jnp.sqrt(importance)
