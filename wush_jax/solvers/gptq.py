"""GPTQ with block transforms: quantize column by column, later columns absorb the error.

Algorithm 2 of the WUSH paper, rearranged so that it needs one Cholesky factor and no inverse. With
the damped Hessian ``H = R R^T`` (R upper triangular) and the error so far ``D = What - W`` the
weights that minimise the loss over everything not yet quantized are, for block j (rows of W are
outputs)::

    W(j) <- W(j) - (sum_{i<j} D_i R_ij) R_jj^-1

which is the paper's running update ``W(j) += L_ji L_ii^-1 E(i)`` with ``L = R^-T``, summed up. The
conditional Hessian of a block is ``(L_ii L_ii^T)^-1 = R_ii R_ii^T``; under a transform it becomes
``(T R_ii) (T R_ii)^T`` and the same identity serves groups and single columns inside the block.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from wush_jax.formats import Format, QuantizedArray
from wush_jax.solvers import feedback, scale_search
from wush_jax.solvers import hessian as hessians
from wush_jax.solvers.descent import descend
from wush_jax.transforms import BlockTransform, apply_transform, check_finite, linalg
from wush_jax.transforms.moments import second_moment

# Builds a block's transform from (M_W, M_X, damping), each (d, d); hashable, so that it can be
# static under jit.
TransformRule = Callable[[jax.Array, jax.Array, jax.Array], BlockTransform]

# The updates enlarge weights: headroom of a global scale derived from the original ones.
HEADROOM = 2.0


@dataclass(frozen=True)
class Options:
    """The static arguments of one compilation."""

    fmt: Format
    block: int
    steps: tuple[int, ...]
    order: bool
    dtype: str
    rule: TransformRule | None
    descent: int


def gptq(
    weight: jax.Array,
    hessian: jax.Array,
    transform: BlockTransform | TransformRule,
    fmt: Format,
    *,
    block_size: int | None = None,
    damping: float = 1e-2,
    scales: str = "rule",
    cross_moment: jax.Array | None = None,
    pairs: tuple[jax.Array, jax.Array] | None = None,
    descent: int = 0,
    activation_order: bool = False,
    dtype: str = "float32",
    name: str = "weight",
    notes: list[tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[QuantizedArray, BlockTransform]:
    """Quantize a weight with error feedback; each block in the coordinates of its own transform.

    Blocks in order; the columns of a block in order; a group's scale is fixed when its first column
    is reached, from the weights as updated by then (in blocks of several groups that is as good as
    scales from the block's start, or a few percent better). Column c, with the factor R' of the
    conditional Hessian::

        w_c <- w_c - sum_{b<c} (what_b - w_b) R'_bc / R'_cc ;  what_c = decode(encode(w_c))

    Channels that calibration never saw (zero diagonal) get the mean diagonal: they neither receive
    nor cause feedback and end as round-to-nearest.

    Args:
      weight: W (N, K).
      hessian: second moment of the inputs, (K, K), undamped.
      transform: pairs that tile K, already rounded to their run-time dtype; or a hashable function
        ``(M_W, M_X, damping) -> BlockTransform`` of (d, d) moments, called for each block with the
        moment of the weights as updated so far and the marginal block of the Hessian.
      fmt: the weight's format. A derived global scale (``global_scale=None``) comes from the
        transformed original weights with a factor 2 of headroom.
      block_size: d where ``transform`` is a function; None means the group size.
      damping: lambda of the Hessian, relative to its mean diagonal; multiplied by 10, up to 1,
        while the Hessian is not positive definite (a warning says so).
      scales: "rule" takes the format's scale; "sweep" tries the neighbours of
        `wush_jax.solvers.scale_search.OFFSETS` and keeps the least error of the group, feedback
        included.
      cross_moment: ``E[x_q x^T]`` (K, K) where ``hessian`` is ``E[x_q x_q^T]`` of quantized inputs;
        the weights then aim at ``W E[x x_q^T] E[x_q x_q^T]^-1``, which makes up for what quantizing
        the inputs does on average. None: the inputs are not quantized.
      pairs: with ``cross_moment``, rows x and x_q, (S, K) each: every output of the weights aimed
        at is rescaled to slope one on them (`wush_jax.solvers.hessian.with_unit_slope`). None: it
        is not.
      descent: sweeps of coordinate descent over all codes afterwards (`wush_jax.solvers.descent`).
      activation_order: treat blocks in descending order of ``tr M_X``. The result is laid out as
        ever; nothing is permuted at run time.
      dtype: "float32" or "float64" of weights and feedback. Factors are always built in float64.
      name: of the layer, for messages.
      notes: takes, for `wush_jax.solvers.hessian.report`, how many dampings were tried and whether
        all is finite: under jit nothing can be said. None: it is said here, outside jit.

    Returns:
      `QuantizedArray` (N, K) in transformed coordinates, and the transforms used. Finite for
      finite weights; under jit a hopeless Hessian acts as the identity (no feedback).

    Raises:
      ValueError: shapes that do not fit, an unknown option, non-finite input, or a Hessian that is
        not positive definite at damping 1 (outside jit).

    Source: WUSH paper, algorithm 2; GPTQ (arXiv 2210.17323).

    >>> from wush_jax import MXFP4, hadamard_transform
    >>> w = jax.random.normal(jax.random.key(0), (4, 64))
    >>> gptq(w, jnp.eye(64), hadamard_transform(32), MXFP4)[0].shape
    (4, 64)
    """
    if isinstance(transform, BlockTransform):
        rule, given, block = None, transform, transform.block_size
    else:
        rule, given, block = transform, None, block_size or fmt.group_size
    _check(weight, hessian, block, fmt, damping, scales, dtype, name)
    if cross_moment is not None and jnp.shape(cross_moment) != jnp.shape(hessian):
        raise ValueError(
            f"cross_moment has shape {jnp.shape(cross_moment)}; for {name} it must be that of "
            f"hessian, {jnp.shape(hessian)}"
        )
    if pairs is not None and cross_moment is None:
        raise ValueError("pairs are of quantized inputs; pass their cross_moment too")
    if descent < 0:
        raise ValueError(f"descent={descent} must be a number of sweeps, 0 for none")
    steps = scale_search.offsets(fmt, scales)
    options = Options(fmt, block, steps, activation_order, jnp.dtype(dtype).name, rule, descent)
    dampings = hessians.dampings(damping)
    # Under a trace the steps are traced as they are: vmap would batch the jaxpr of an inner jit
    # outside the x64 context and lose its float64 products.
    arrays = jax.tree.leaves((weight, hessian, cross_moment, pairs, given))
    traced = any(isinstance(a, jax.core.Tracer) for a in arrays)
    solve = _steps if traced else _compiled_steps
    with _wide(options.dtype):
        quantized, used, attempts, finite = solve(
            weight, hessian, cross_moment, pairs, given, jnp.asarray(dampings, dtype), options
        )
    if notes is not None:
        notes.append((attempts, finite))
    elif not traced:
        hessians.report(int(attempts), bool(finite), dampings, name)
    return quantized, used


def _check(weight, hessian, block, fmt, damping, scales, dtype, name) -> None:
    shape = jnp.shape(weight)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"weight has shape {shape} ({name}); it must be (N, K), both at least 1")
    k = shape[1]
    if jnp.shape(hessian) != (k, k):
        raise ValueError(
            f"hessian has shape {jnp.shape(hessian)}; for the weight {shape} of {name} it must be "
            f"{(k, k)}: collect full moments (block=None) for GPTQ"
        )
    if k % block or block % fmt.group_size:
        raise ValueError(
            f"block_size={block} must divide K={k} of {name} and be a multiple of group_size="
            f"{fmt.group_size}; choose another block_size or format"
        )
    if not damping >= 0:
        raise ValueError(f"damping={damping} must be non-negative; try 1e-2")
    for argument, value, choices in (
        ("scales", scales, ("rule", "sweep")),
        ("dtype", jnp.dtype(dtype).name, ("float32", "float64")),
    ):
        if value not in choices:
            raise ValueError(f"{argument}={value!r} is unknown; choose one of {choices}")
    check_finite(f"weight of {name}", weight)
    check_finite(f"hessian of {name}", hessian)


def _steps(weight, hessian, cross, pairs, transform, dampings, options: Options):
    """Everything of `gptq` but the checks; also the dampings tried, and whether all is finite."""
    d, n, fmt = options.block, weight.shape[0], options.fmt
    weight, hessian = weight.astype(options.dtype), hessian.astype(options.dtype)
    marginal = linalg.diagonal_blocks(hessian, d)
    order = _order(marginal) if options.order else None
    marginal = _permute(marginal, order)
    weight = _permute_columns(weight, order, d)
    hessian = _permute_both(hessian, order, d)
    if cross is not None:
        cross = _permute_both(cross.astype(options.dtype), order, d)
    if transform is not None and transform.activation.ndim == 3:
        transform = _permute(transform, order)
    unit, roots, best, shift, attempts = hessians.factor(hessian, weight, cross, d, dampings)
    if pairs is not None:
        rows = (_permute_columns(x.astype(options.dtype), order, d) for x in pairs)
        best = hessians.with_unit_slope(best, weight, *rows)
    weight = best
    global_scale = _global_scale(weight, marginal, transform, dampings, options)
    codes, scale, used = _blocks(
        weight, unit, roots, marginal, transform, dampings, global_scale, options
    )
    if options.descent:
        codes = _descend(codes, scale, weight, hessian, shift, used, global_scale, options)
    # (B, G, g, N) and (B, G, N) to rows of outputs, blocks back in their places.
    back = None if order is None else _inverse(order)
    codes, scale = (_permute(a, back).reshape(-1, n).T for a in (codes, scale))
    if used.activation.ndim == 3:
        used = _permute(used, back)
    packed = QuantizedArray(fmt.pack(codes), fmt.store_scales(scale), global_scale, fmt)
    finite = [jnp.all(jnp.isfinite(a.astype(jnp.float32))) for a in (scale, *jax.tree.leaves(used))]
    return packed, used, attempts, functools.reduce(jnp.logical_and, finite)


def _descend(codes, scale, weight, hessian, shift, used, global_scale, options: Options):
    """Coordinate descent in transformed coordinates, on the same damped Hessian."""
    n, k = weight.shape
    t_x, t_w = (t.astype(weight.dtype) for t in (used.activation, used.weight))
    damped = hessian + jnp.eye(k, dtype=hessian.dtype) * shift[None]
    moved = apply_transform(apply_transform(damped, t_x).T, t_x)
    target = apply_transform(weight, t_w).T
    flat = codes.reshape(k, n), scale.reshape(-1, n)
    lower = descend(*flat, target, moved, options.fmt, global_scale, options.descent)
    return lower.reshape(codes.shape)


_compiled_steps = jax.jit(_steps, static_argnames="options")


def compile_steps(
    weight: jax.ShapeDtypeStruct,
    hessian: jax.ShapeDtypeStruct,
    given: BlockTransform | None,
    dampings: list[float],
    options: Options,
) -> tuple[QuantizedArray, BlockTransform]:
    """Compile what `gptq` runs for arrays of these shapes, and return the shapes of its results."""
    with _wide(options.dtype):
        tried = jnp.asarray(dampings, options.dtype)
        lowered = _compiled_steps.lower(weight, hessian, None, None, given, tried, options)
    lowered.compile()
    return shapes_of(lowered.out_info[:2])


def shapes_of(infos):
    """Return what `jax.stages.Lowered` says of its results as a tree of shapes."""
    return jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype), infos)


def _wide(dtype: str) -> contextlib.AbstractContextManager:
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def _order(marginal: jax.Array) -> jax.Array:
    """Blocks in descending order of their input power, int32 (K/d,)."""
    energy = jnp.trace(marginal, axis1=-2, axis2=-1)
    # Not argsort, whose index type depends on the x64 context.
    return lax.sort((-energy, jnp.arange(len(energy), dtype=jnp.int32)), num_keys=1)[1]


def _inverse(order: jax.Array) -> jax.Array:
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))


def _permute(tree, order: jax.Array | None):
    return tree if order is None else jax.tree.map(lambda a: a[order], tree)


def _permute_columns(x: jax.Array, order: jax.Array | None, d: int) -> jax.Array:
    """Permute the blocks of the last axis."""
    return x if order is None else x.reshape(len(x), -1, d)[:, order].reshape(x.shape)


def _permute_both(x: jax.Array, order: jax.Array | None, d: int) -> jax.Array:
    """Permute the blocks of rows and of columns."""
    return _permute_columns(_permute_columns(x, order, d).T, order, d).T


def _global_scale(weight, marginal, transform, dampings, options: Options) -> jax.Array:
    if options.fmt.global_scale is not None:
        return jnp.float32(options.fmt.global_scale)
    if transform is None:
        m_w = second_moment(weight, options.block)
        transform = jax.vmap(lambda w, x: _build(options.rule, w, x, dampings))(m_w, marginal)
    amax = jnp.max(jnp.abs(apply_transform(weight, transform.weight)))
    return options.fmt.derive_global_scale((HEADROOM * amax).astype(jnp.float32))


def _build(rule, weight_moment, activation_moment, dampings) -> BlockTransform:
    """The rule's transform of one block, at the first damping that gives a finite one."""
    shape = jax.eval_shape(rule, weight_moment, activation_moment, dampings[0])

    def attempt(state):
        tried, _ = state
        return tried + 1, rule(weight_moment, activation_moment, dampings[tried])

    def failed(state):
        tried, pair = state
        finite = [jnp.all(jnp.isfinite(t.astype(jnp.float32))) for t in jax.tree.leaves(pair)]
        return (tried < len(dampings)) & ~functools.reduce(jnp.logical_and, finite)

    nothing = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shape)
    return lax.while_loop(failed, attempt, (jnp.int32(0), nothing))[1]


def _blocks(weight, unit, roots, marginal, transform, dampings, global_scale, options: Options):
    """Scan over blocks: codes (B, G, g, N), scales (B, G, N) and the transforms used."""
    d, g = options.block, options.fmt.group_size
    if transform is not None:
        inner = feedback.inner_factor(transform.activation, roots, g)
        per_block = transform.activation.ndim == 3

    def step(delta, xs):
        i, root, m_x, given = xs
        original = lax.dynamic_slice_in_dim(weight, i * d, d, axis=1)
        column = lax.dynamic_slice_in_dim(unit, i * d, d, axis=1)
        current = original - linalg.matmul(delta, column)
        if transform is None:
            m_w = linalg.matmul(current.T, current) / current.shape[0]
            pair = _build(options.rule, m_w, m_x, dampings)
            factors = feedback.inner_factor(pair.activation, root, g)
        else:
            factors, pair = given
            pair = pair if per_block else transform
        t_x, t_w = (t.astype(weight.dtype) for t in (pair.activation, pair.weight))
        moved = linalg.matmul(t_w, current.T)
        codes, scale, error = feedback.quantize_block(
            moved, factors, options.fmt, options.steps, global_scale
        )
        error = linalg.matmul((moved + error).T, t_x) - original
        delta = lax.dynamic_update_slice_in_dim(delta, error, i * d, axis=1)
        return delta, (codes, scale, pair if transform is None else None)

    index = jnp.arange(weight.shape[1] // d, dtype=jnp.int32)
    given = None if transform is None else (inner, transform if per_block else None)
    xs = (index, roots, marginal if transform is None else None, given)
    _, (codes, scale, built) = lax.scan(step, jnp.zeros_like(weight), xs)
    return codes, scale, built if transform is None else transform
