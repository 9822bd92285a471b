"""How two quantizations of the same values may differ: only where a sum's order moved a value."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference, repack

# Share of codes, and of scales, that may differ (float32 sums in another order).
SHARE = 1e-5
# Two compilations of one sum agree bit for bit. A GPU's compiler times kernels and may take another
# for each.
ONE_ORDER = jax.default_backend() == "cpu"


def power_of_error(y, exact):
    """Mean square of the error over the mean square of what is exact."""
    y, exact = (np.asarray(v, np.float64) for v in (y, exact))
    return np.mean((y - exact) ** 2) / np.mean(exact**2)


def two_programs(found, expected):
    """Compare results of two programs that compute the same: equal, or to float32 rounding.

    The rounding of some 64 products and sums of 2^-24 each, one after the other; narrower results
    may round to either side.
    """
    found, expected = jnp.asarray(found), jnp.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    step = float(jnp.finfo(found.dtype).eps)
    found, expected = (np.asarray(v, np.float64) for v in (found, expected))
    if ONE_ORDER:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=step, atol=1e-5 * np.abs(expected).max())


def definition(x, transform, fmt, layout="interchange"):
    """The jitted definition; the global scale is an argument, lest XLA folds it into the rule."""

    @jax.jit
    def run(x, transform, g):
        return reference.transform_quantize(x, transform, fmt, global_scale=g)

    codes, scales = run(x, transform, jnp.float32(fmt.global_scale))
    if layout == "lanes":
        return repack.to_lanes(codes), scales
    return repack.from_interchange(codes, scales, fmt, layout)


def steps(nibbles, fmt):
    """Codes as integers in the order of the values they stand for."""
    nibbles = nibbles.astype(np.int32)
    if fmt.element.name == "e2m1":
        return np.where(nibbles & 8, -(nibbles & 7), nibbles)
    return np.where(nibbles & 8, nibbles - 16, nibbles)


def nibbles(packed, layout):
    """Codes of each column, (M, K), of packed bytes; of "lanes" in their own order within 32."""
    low, high = packed & 15, packed >> 4
    if layout in ("interchange", "lanes"):
        return np.stack([low, high], -1).reshape(packed.shape[0], -1)
    chunks = [part.reshape(packed.shape[0], -1, 16) for part in (low, high)]
    return np.concatenate(chunks, -1).reshape(packed.shape[0], -1)


def same(got, want, fmt, layout="interchange", share=SHARE):
    """Assert equality up to `share`, and there up to one step of the grid."""
    got, want = ([np.asarray(a) for a in pair] for pair in (got, want))
    bits = {1: np.uint8, 2: np.uint16}[got[1].dtype.itemsize]
    if layout == "kernel":
        got, want = ((codes, scales.T) for codes, scales in (got, want))
    pairs = got, want = tuple(got), tuple(want)
    scales = [a[1].view(bits) for a in pairs]
    nan = [np.isnan(a[1].astype(np.float32)) for a in pairs]
    np.testing.assert_array_equal(*nan)
    other_scale = (scales[0] != scales[1]) & ~nan[0]
    assert other_scale.mean() <= share, f"{other_scale.sum()} scales of {other_scale.size} differ"
    codes = [steps(nibbles(a[0], layout), fmt) for a in (got, want)]
    distance = np.abs(codes[0] - codes[1])
    assert (distance > 0).mean() <= share + fmt.group_size * other_scale.mean()
    distance[np.repeat(other_scale, fmt.group_size, axis=1)] = 0
    assert distance.max() <= 1
