"""Linear algebra of small blocks: Hadamard matrices, damping, Cholesky, spectral factors.

Construction runs in float64 through a local x64 context and is cast down on leaving; nothing here
changes the global switch. Every matmul states its precision.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wush_jax.formats.checks import check_dtype, check_size
from wush_jax.formats.elements import TINY

HIGHEST = lax.Precision.HIGHEST
# The largest Hadamard matrix that is built: float64, 8 GiB.
LARGEST = 2**15


def hadamard_matrix(n: int, dtype=jnp.float32) -> jax.Array:
    """Return an orthonormal Hadamard matrix: entries ``±1/sqrt(n)``, ``H H^T = I``.

    Sylvester's doubling ``[[H, H], [H, -H]]`` of a core of size 1, ``q + 1`` (Paley I, q = 3 mod 4)
    or ``2 (q + 1)`` (Paley II, q = 1 mod 4), q prime. So all powers of two (Sylvester's symmetric
    matrix itself, as in other libraries), and 12, 20, 24, 28, 36, 40, 44, 48, 56, 60, 68, ...

    Args:
      n: size, at least 1.
      dtype: of the result, floating point.

    Returns:
      (n, n).

    Raises:
      ValueError: n is no whole number from 1 to 2^15, or no such construction reaches it.

    Source: Paley, "On orthogonal matrices" (1933).

    >>> hadamard_matrix(4)[:2].tolist()
    [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]]
    """
    check_dtype(dtype=dtype)
    return jnp.asarray(hadamard_numpy(n), dtype)


def hadamard_numpy(n: int, name: str = "n") -> np.ndarray:
    """Return `hadamard_matrix` as a float64 numpy array: a constant, whatever the x64 switch.

    ``name`` is what a refusal calls the size.
    """
    check_size(**{name: n})
    signs = _hadamard_signs(int(n)) if n <= LARGEST else None
    if signs is None:
        raise ValueError(
            f"{name}={n}: no Hadamard matrix of this size is known here; use a power of two, or "
            "2**k (q+1) with a prime q = 3 mod 4, or 2**(k+1) (q+1) with a prime q = 1 mod 4, up "
            f"to {LARGEST}"
        )
    return signs / np.sqrt(n)


@functools.cache
def _hadamard_signs(n: int) -> np.ndarray | None:
    """±1 Hadamard matrix of size n, an immutable array (a pure function's memo), or None."""
    core, doublings = n, 0
    if n & (n - 1) == 0:  # Sylvester's own, though Paley reaches 4, 8, 32 as well
        core, doublings = 1, n.bit_length() - 1
    while (signs := _paley(core)) is None:
        if core % 2:
            return None
        core, doublings = core // 2, doublings + 1
    for _ in range(doublings):
        signs = np.block([[signs, signs], [signs, -signs]])
    signs.setflags(write=False)
    return signs


def _paley(n: int) -> np.ndarray | None:
    """Paley's construction of size n, the trivial one for 1, or None."""
    if n == 1:
        return np.ones((1, 1))
    q = n - 1
    if q % 4 == 3 and _is_prime(q):
        skew = np.zeros((n, n))
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _residue_matrix(q)
        return skew + np.eye(n)
    q = n // 2 - 1
    if n % 2 == 0 and q % 4 == 1 and _is_prime(q):
        symmetric = np.zeros((q + 1, q + 1))
        symmetric[0, 1:] = symmetric[1:, 0] = 1
        symmetric[1:, 1:] = _residue_matrix(q)
        zero, sign = np.array([[1, -1], [-1, -1]]), np.array([[1, 1], [1, -1]])
        return np.kron(np.eye(q + 1), zero) + np.kron(symmetric, sign)
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % f for f in range(2, int(q**0.5) + 1))


def _residue_matrix(q: int) -> np.ndarray:
    """Jacobsthal matrix: Legendre symbol of (row - column) modulo the prime q."""
    symbol = -np.ones(q)
    symbol[np.unique(np.arange(1, q) ** 2 % q)] = 1
    symbol[0] = 0
    return symbol[(np.arange(q)[:, None] - np.arange(q)) % q]


def float64_construction(function):
    """Run ``function`` on float64 copies of its array arguments; cast floating results down.

    The x64 switch is set for the duration of the call (or trace) only. Results come back as
    float32, or as float64 where the caller works in float64 himself. Works under jit, vmap and
    scan. It is not differentiable: JAX transposes a traced function outside the local context.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        enabled = jax.config.read("jax_enable_x64")
        wide = enabled and any(getattr(a, "dtype", None) == "float64" for a in args)
        out_dtype = jnp.float64 if wide else jnp.float32
        with jax.enable_x64(True):
            widened = [jnp.asarray(a).astype(jnp.float64) if _is_floating(a) else a for a in args]
            out = function(*widened, **kwargs)
            return jax.tree.map(
                lambda leaf: leaf.astype(out_dtype) if _is_floating(leaf) else leaf, out
            )

    return wrapped


def _is_floating(x) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def damp(moment: jax.Array, damping: float) -> jax.Array:
    """Return ``M + damping * mean(diag M) * I`` for each block (..., d, d).

    A block of zeros has no scale of its own and becomes the identity. In one that is nearly zero
    products below 2^-126 have vanished, which may leave eigenvalues down to -d 2^-126: the mean
    counts as 256 of these at least.

    Source: WUSH paper, section 4 (lambda = 1e-2).
    """
    d = moment.shape[-1]
    mean = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / d
    eye = jnp.broadcast_to(jnp.eye(d, dtype=moment.dtype), moment.shape)
    added = damping * jnp.maximum(mean, 256 * d * TINY)
    return jnp.where(mean != 0, moment + added * eye, eye)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product (..., n, k) x (..., k, m) at the highest precision, leading axes broadcast.

    Unlike ``jnp.matmul`` it records no result type, so that a traced float64 construction can be
    batched outside its x64 context (a vmap of a jit).
    """
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(m, batch + m.shape[-2:]) for m in (a, b))
    return lax.batch_matmul(a, b, precision=HIGHEST)


def spectral_factors(
    weight_moment: jax.Array, activation_moment: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``(U^T W'^T, S, V^T X'^T)`` with ``W' W'^T = M_W, X' X'^T = M_X, W'^T X' = U S V^T``.

    S descends. Signs are fixed so that the largest entry of each row of the first factor is
    positive, which makes the result the same for every backend's SVD.

    Args:
      weight_moment: (..., d, d), positive definite.
      activation_moment: (..., d, d), positive definite.

    Returns:
      (..., d, d), (..., d), (..., d, d).

    Source: WUSH paper, eq. 5-7.
    """
    return map_blocks(_spectral_factors, weight_moment, activation_moment)


def _spectral_factors(weight_moment, activation_moment):
    w = jnp.linalg.cholesky(weight_moment)
    x = jnp.linalg.cholesky(activation_moment)
    u, s, vt = jnp.linalg.svd(matmul(w.mT, x))
    left, right = matmul(u.mT, w.mT), matmul(vt, x.mT)
    flip = -jnp.min(left, axis=-1, keepdims=True) > jnp.max(left, axis=-1, keepdims=True)
    sign = jnp.where(flip, -1.0, 1.0).astype(left.dtype)
    return left * sign, s, right * sign


def singular_values(weight_moment: jax.Array, activation_moment: jax.Array) -> jax.Array:
    """Return S of `spectral_factors` alone, (..., d), descending."""
    return map_blocks(_singular_values, weight_moment, activation_moment)


def _singular_values(weight_moment, activation_moment):
    w = jnp.linalg.cholesky(weight_moment)
    x = jnp.linalg.cholesky(activation_moment)
    return jnp.linalg.svd(matmul(w.mT, x), compute_uv=False)


def inverse(matrix: jax.Array) -> jax.Array:
    """Return the inverse of each block (..., d, d)."""
    return map_blocks(jnp.linalg.inv, matrix)


def map_blocks(function, *blocks: jax.Array):
    """Apply a factorisation to blocks (..., d, d): one call for all, but one by one on the CPU.

    jaxlib before 0.11 splits a batched LAPACK call among the threads of the pool that the call
    itself occupies, and waits: as many such calls at a time as there are threads never end.

    Args:
      function: of arrays (..., d, d), any number of leading axes.
      *blocks: arrays of one shape.
    """
    lead = blocks[0].shape[:-2]
    if not lead:
        return function(*blocks)
    flat = [b.reshape(-1, *b.shape[-2:]) for b in blocks]
    out = lax.platform_dependent(
        *flat, cpu=lambda *all_: lax.map(lambda one: function(*one), all_), default=function
    )
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), out)


@functools.partial(jax.jit, static_argnums=1)
def diagonal_blocks(moment: jax.Array, block: int) -> jax.Array:
    """Return the diagonal blocks of (..., K, K): (..., K/block, block, block).

    >>> diagonal_blocks(jnp.arange(16.0).reshape(4, 4), 2)[1].tolist()
    [[10.0, 11.0], [14.0, 15.0]]
    """
    k = moment.shape[-1]
    if k % block:
        raise ValueError(f"block={block} does not divide K={k} of the moment {moment.shape}")
    tiles = moment.reshape(*moment.shape[:-2], k // block, block, k // block, block)
    return jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)


def upper_factor(matrix: jax.Array) -> jax.Array:
    """Return the upper triangular R with ``R R^T = M``: Cholesky from the last row upwards.

    ``L = R^-T`` is the lower Cholesky factor of ``M^-1``, so nothing needs to be inverted.

    Args:
      matrix: (..., K, K), positive definite; only its upper triangle is read.

    Returns:
      (..., K, K); NaN where the matrix is not positive definite.

    >>> r = upper_factor(jnp.float32([[5.0, 2.0], [2.0, 4.0]]))
    >>> r.tolist(), (r @ r.T).tolist()
    ([[2.0, 1.0], [0.0, 2.0]], [[5.0, 2.0], [2.0, 4.0]])
    """
    flipped = lax.linalg.cholesky(matrix[..., ::-1, ::-1], symmetrize_input=False)
    return flipped[..., ::-1, ::-1]


def unit_blocks(r: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Return ``R_ij R_jj^-1`` (..., K, K) and ``R_jj`` (..., K/d, d, d), R upper triangular.

    >>> unit, roots = unit_blocks(jnp.float32([[2.0, 3.0], [0.0, 4.0]]), 1)
    >>> unit.tolist(), roots.ravel().tolist()
    ([[1.0, 0.75], [0.0, 1.0]], [2.0, 4.0])
    """
    k = r.shape[-1]
    roots = diagonal_blocks(r, block)
    eye = jnp.broadcast_to(jnp.eye(block, dtype=r.dtype), roots.shape)
    inverse = lax.linalg.triangular_solve(roots, eye, left_side=True, lower=False)
    # As `matmul`, and not an einsum, which records a result type.
    columns = jnp.moveaxis(r.reshape(*r.shape[:-1], k // block, block), -2, -3)
    return jnp.moveaxis(matmul(columns, inverse), -3, -2).reshape(r.shape), roots
