"""What quantizing the activations adds to them: measured, modelled, and kept small by gains.

With ``x_q = T_X^-1 q(T_X x) = x + e`` a layer's loss is ``E||W' x_q - W x||^2``: its Hessian is
``E[x_q x_q^T]`` and its cross moment ``E[x_q x^T]``. Both differ from ``M_X`` by moments of e.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wush_jax.formats import Format, fake_quantize
from wush_jax.solvers import scale_search
from wush_jax.transforms import BlockTransform, apply_transform, linalg
from wush_jax.transforms.sample import Sample

# Gains to try for a block: an octave in steps of 2**(1/8), 1 first so that it wins ties.
# Power-of-two scales repeat after an octave.
GAINS = tuple(2.0 ** (j / 8) for j in range(8))
# Exponent bits of a grid on which nearly all values of a group are normal.
MANY_OCTAVES = 4


@functools.cache
def relative_error(fmt: Format) -> float:
    """Return ``E||q(z) - z||^2 / E||z||^2`` of Gaussian z: the power of a format's error.

    Measured on 2^17 values of a fixed draw, to about 1 %; a Hadamard factor makes the values of a
    block nearly Gaussian.

    >>> from wush_jax import MXFP4
    >>> round(relative_error(MXFP4), 3)
    0.014
    """
    with jax.ensure_compile_time_eval():
        return float(_relative_error(jax.random.key(0), fmt))


# The key is an argument: what depends on none is folded, one operation after the other.
@functools.partial(jax.jit, static_argnums=1)
def _relative_error(key: jax.Array, fmt: Format) -> jax.Array:
    z = jax.random.normal(key, (2**17 // fmt.group_size, fmt.group_size), jnp.float32)
    e = fake_quantize(z, fmt) - z
    return jnp.sum(e * e) / jnp.sum(z * z)


def modelled_noise(
    activation_blocks: jax.Array, transform: BlockTransform, fmt: Format
) -> jax.Array:
    """Return the moment of e in original coordinates, modelled as independent of x.

    ``T_X^-1 (eps * mean over each group of diag(T_X M_X T_X^T)) T_X^-T`` with eps of
    `relative_error`: a group shares its scale, so all its values get the same noise. On grids of
    many octaves (E4M3, E5M2), whose steps follow each value, so does its noise: a group of one.

    Args:
      activation_blocks: M_X (K/d, d, d).
      transform: blocks that tile K, (K/d, d, d) or (d, d).
      fmt: the activations' format.

    Returns:
      float32 (K/d, d, d).

    >>> from wush_jax import MXFP4, identity_transform
    >>> noise = modelled_noise(jnp.eye(32)[None], identity_transform(32), MXFP4)
    >>> jnp.allclose(noise[0], relative_error(MXFP4) * jnp.eye(32)).item()
    True
    """
    follows = getattr(fmt.element, "exponent_bits", 0) >= MANY_OCTAVES
    d, g = transform.block_size, 1 if follows else fmt.group_size
    metric = scale_search.group_metric(activation_blocks, transform.activation, g)
    power = jnp.trace(metric, axis1=-2, axis2=-1) / g
    variance = relative_error(fmt) * jnp.repeat(power, g).reshape(-1, d)
    back = jnp.broadcast_to(transform.weight.astype(jnp.float32), (*variance.shape, d))
    return linalg.matmul(back.mT, variance[..., None] * back)


class SampledNoise(NamedTuple):
    """Moments of e on a sample, in original coordinates.

    Attributes:
      mean: ``E[e]`` (K,): what all tokens have in common, such as a large constant channel, rounds
        the same way in all of them. Shrunk to zero, block by block, as far as chance explains it.
      input_mean: ``E[x]`` (K,).
      covariance: the diagonal blocks of e's covariance, (K/d, d, d). Between blocks and with x the
        rest of e is uncorrelated but for chance, which in a small sample is larger than the truth.
    """

    mean: jax.Array
    input_mean: jax.Array
    covariance: jax.Array


def sampled_noise(
    sample: Sample, transform: BlockTransform, fmt: Format, global_scale: jax.Array | None = None
) -> SampledNoise:
    """Measure the error of a sample of rows.

    Args:
      sample: rows of the layer's input.
      transform: blocks that tile K.
      fmt: the activations' format.
      global_scale: of the activations, or None for the format's.
    """
    error = _error(sample, transform, fmt, global_scale)
    share = sample.weights / jnp.maximum(jnp.sum(sample.weights), jnp.finfo(jnp.float32).tiny)
    mean, input_mean = (linalg.matmul(share[None], x)[0] for x in (error, sample.rows))
    rest = (error - mean[None]).reshape(len(error), -1, transform.block_size)
    weighted = rest * share[:, None, None]
    covariance = jnp.einsum("sbi,sbj->bij", weighted, rest, precision=linalg.HIGHEST)
    # Positive-part James-Stein: what the mean's own variance leaves of it.
    blocks = mean.reshape(-1, transform.block_size)
    chance = jnp.trace(covariance, axis1=-2, axis2=-1) * jnp.sum(share * share)
    power = jnp.maximum(jnp.sum(blocks * blocks, axis=-1), jnp.finfo(jnp.float32).tiny)
    kept = jnp.maximum(0.0, 1.0 - chance / power)
    return SampledNoise((blocks * kept[:, None]).ravel(), input_mean, covariance)


def quantized_pairs(
    sample: Sample, transform: BlockTransform, fmt: Format, global_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return x and x_q of a sample, (S, K) each, each row times the square root of its weight.

    Args:
      sample: rows of the layer's input.
      transform: blocks that tile K.
      fmt: the activations' format.
      global_scale: of the activations, or None for the format's.
    """
    root = jnp.sqrt(sample.weights)[:, None]
    error = _error(sample, transform, fmt, global_scale)
    return root * sample.rows, root * (sample.rows + error)


def with_noise(moment: jax.Array, noise: jax.Array | SampledNoise) -> tuple[jax.Array, jax.Array]:
    """Return ``E[x_q x_q^T]`` and ``E[x_q x^T]`` (K, K) of ``x_q = x + e``.

    Args:
      moment: M_X (K, K).
      noise: of `modelled_noise` or `sampled_noise`.

    >>> a, b = with_noise(jnp.eye(4), jnp.ones((2, 2, 2)))
    >>> a[0].tolist(), b[0].tolist()
    ([2.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    """
    if not isinstance(noise, SampledNoise):
        return _add_blocks(moment, noise), moment
    cross = moment + jnp.outer(noise.mean, noise.input_mean)
    both = cross + jnp.outer(noise.input_mean + noise.mean, noise.mean)
    return _add_blocks(both, noise.covariance), cross


def best_gains(
    sample: Sample,
    transform: BlockTransform,
    weight_blocks: jax.Array,
    fmt: Format,
    global_scale: jax.Array | None = None,
) -> jax.Array:
    """Return the gain of each block with the least error of the activations, as the weights see it.

    ``q(g y) / g - y`` weighted by ``T_W M_W T_W^T``. Where one token's direction rules a block, its
    values round by one and the same relative error, coherently, and the gain moves them to where
    that error is small. Free at run time: ``g T_X`` is the transform, ``T_W / g`` its partner.

    Args:
      sample: rows of the layer's input.
      transform: blocks (K/d, d, d).
      weight_blocks: M_W (K/d, d, d).
      fmt: the activations' format.
      global_scale: of the activations, or None for the format's.

    Returns:
      float32 (K/d,), each one of `GAINS`.
    """
    d = transform.block_size
    moved = apply_transform(sample.rows, transform.activation)
    metric = scale_search.group_metric(weight_blocks, transform.weight, d)
    weights = sample.weights

    def loss(gain):
        error = fake_quantize(gain * moved, fmt, global_scale=global_scale) / gain - moved
        blocks = error.reshape(len(error), -1, d)
        spread = jnp.einsum("sbi,bij->sbj", blocks, metric, precision=linalg.HIGHEST)
        return jnp.einsum("s,sbj,sbj->b", weights, spread, blocks, precision=linalg.HIGHEST)

    gains = jnp.asarray(GAINS, jnp.float32)
    losses = jax.lax.map(loss, gains)
    return gains[jnp.argmin(losses, axis=0)]


def _error(sample: Sample, transform: BlockTransform, fmt: Format, global_scale) -> jax.Array:
    """e of the sampled rows (S, K), in original coordinates."""
    moved = apply_transform(sample.rows, transform.activation)
    error = fake_quantize(moved, fmt, global_scale=global_scale) - moved
    return apply_transform(error, transform.weight.mT)


def _add_blocks(moment: jax.Array, blocks: jax.Array) -> jax.Array:
    count, d, _ = blocks.shape
    tiles = moment.reshape(count, d, count, d)
    index = jnp.arange(count)
    return tiles.at[index, :, index].add(blocks.astype(moment.dtype)).reshape(moment.shape)
