"""The one place that chooses an implementation: checks, ordered candidates, gathered reasons.

An implementation that cannot serve a call raises ``NotImplementedError``; only this module catches
it and goes on to the next candidate. A caller's mistake is a ``ValueError`` before any candidate
is tried. A forced implementation never falls back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax

from pallas_kernels import checks, fragments, normed, reference, repack
from pallas_kernels import precision as losses
from pallas_kernels.hopper import matmul, mosaic_gpu, ragged, roads
from pallas_kernels.library import scaled_dot, xla, xla_fp8, xla_ragged

Implementation = str | Sequence[str] | None
RAGGED = "mosaic_gpu", "xla", "reference"  # what is tried for rows sorted by group


def transform_quantize(
    x,
    transform,
    fmt,
    *,
    global_scale=None,
    layout: str = "interchange",
    norm=None,
    residual=None,
    implementation: Implementation = None,
):
    """Transform each block, find each group's scale, round to codes, pack.

    ``codes = pack(round(T_b x_b * g / s)), s = rule(T_b x_b)`` per group. Codes and scales get no
    gradient; the straight-through gradient of a quantized layer is `wush_jax.quantized_dot`'s.

    Args:
      x: (..., M, K) floating point.
      transform: (K/d, d, d) one per block, (d, d) shared, or None.
      fmt: the number format.
      global_scale: float32 scalar; None takes the format's own.
      layout: "interchange", or what the matmul kernels want: "kernel" or "fp8"
        (`pallas_kernels.repack`).
      norm: (weight (K,), eps): what is transformed is `normed.rms_norm` of x. The kernel does it up
        to 64 tokens, to MXFP4 or FP8.
      residual: like x; what is normed and transformed is x + residual, rounded to their dtype.
      implementation: None chooses; a name, or names in order of preference, forces: "mosaic_gpu"
        (one kernel, Hopper), "xla" (matmul in x's dtype), "reference".

    Returns:
      Codes uint8 (..., M, K * bits / 8) and scales (..., M, K / g) in the format's scale type, in
      the interchange layout; with a residual x + residual, too.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation or layout.
      NotImplementedError: no permitted implementation can serve the call; all reasons are listed.
    """
    checks.operands(x, transform, fmt)
    if layout not in repack.LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose from {repack.LAYOUTS}")
    checks.before(x, norm, residual)
    before = norm, residual
    x, transform, global_scale, before = jax.lax.stop_gradient((x, transform, global_scale, before))
    if norm is not None:  # the number stays one
        before = (before[0][0], norm[1]), before[1]
    if implementation is None:
        implementation = _candidates()
    codes, scales, total = _first_able(
        "transform_quantize",
        {
            "mosaic_gpu": _laid_out(
                mosaic_gpu.transform_quantize, native=("interchange", "kernel")
            ),
            "xla": _laid_out(xla.transform_quantize),
            "reference": _laid_out(reference.transform_quantize),
        },
        implementation,
        lambda run: run(x, transform, fmt, global_scale, layout, before),
    )
    return (codes, scales) if residual is None else (codes, scales, total)


def _laid_out(run: Callable, native: tuple[str, ...] = ()) -> Callable:
    """Let an implementation that knows some layouts, or only interchange, give any."""

    @functools.wraps(run)
    def call(x, transform, fmt, global_scale, layout, before):
        if native:
            norm, residual = before
            options = {"norm": norm, "residual": residual, "global_scale": global_scale}
            own = layout if layout in native else "interchange"
            codes, scales, total = run(x, transform, fmt, layout=own, **options)
            if layout in native:
                return codes, scales, total
        else:
            x, total = normed.read(x, *before)
            codes, scales = run(x, transform, fmt, global_scale=global_scale)
        return *repack.from_interchange(codes, scales, fmt, layout), total

    return call


def quantized_matmul(
    x, packed, *, out_dtype=None, precision=None, implementation: Implementation = None
):
    """Return ``x @ dequantize(weight)^T`` for values or quantized activations.

    Args:
      x: (..., M, K) values, or quantized activations: an object with ``codes``, ``scales``,
        ``global_scale`` and ``format``.
      packed: quantized weight of shape (N, K), the same kind of object or `fragments.Fragments`
        (what the kernels read), or one that holds it as ``weight``.
      out_dtype: of the result; default x's dtype, float32 for quantized activations.
      precision: what may be lost. None, or "highest", nothing: float32 sums. "default" allows the
        tensor cores' short accumulators, some 14 bits, up to K = 4096 (`precision.fast`), "folded"
        weights of NVFP4 and NVINT4 rounded to FP8 (`fp8_kernel.expanded`); each is taken where it
        is faster.
      implementation: as for `transform_quantize`: "mosaic_gpu" (packed weights in the kernels'
        layout, Hopper), "xla" (weights expanded to bfloat16 by the call), "reference"; only on
        request "xla_fp8" (MXFP4 by MXFP4: weights expanded to FP8 by the call) and "scaled_dot"
        (NVFP4 by NVFP4, Blackwell, never run there).

    Returns:
      (..., M, N).

    Raises:
      ValueError: K differs, or an unknown implementation.
      NotImplementedError: no permitted implementation can serve the call.
    """
    weight = getattr(packed, "weight", packed)
    losses.check(precision)
    checks.inner(x.shape, weight.shape)
    return _first_able(
        "quantized_matmul",
        {
            "mosaic_gpu": matmul.quantized_matmul,
            "xla": xla.quantized_matmul,
            "reference": _short(reference.quantized_matmul, precision),
            "scaled_dot": scaled_dot.quantized_matmul,
            "xla_fp8": _short(xla_fp8.quantized_matmul, precision),
        },
        _candidates() if implementation is None else implementation,
        lambda run: run(x, weight, out_dtype=out_dtype),
    )


def transform_quantize_matmul(
    x,
    transform,
    packed,
    fmt="packed",
    *,
    global_scale=None,
    out_dtype=None,
    gated: bool = False,
    norm=None,
    residual=None,
    precision=None,
    implementation: Implementation = None,
):
    """Return the whole quantized linear map ``dequantize(q(T x)) @ dequantize(weight)^T``.

    Args:
      x: (..., M, K).
      transform: (K/d, d, d), (d, d) or None.
      packed: quantized weight of shape (N, K): an object with ``weight``, ``input_format`` and
        ``input_global_scale`` (`wush_jax.PackedWeight`), or a bare weight as `quantized_matmul`'s.
        A tuple of them, with one K, multiplies the same quantized x; the first one's format and
        scale count.
      fmt: number format of the activations; None leaves them unquantized; "packed" takes
        ``packed.input_format`` and ``packed.input_global_scale``.
      global_scale: of the activations; None takes the format's own.
      out_dtype: of the result; default x's dtype.
      gated: return ``silu(first) * second`` of the products with two weights: one kernel does both
        for many tokens.
      norm: of x, before the transform, as for `transform_quantize`.
      residual: added to x before the norm.
      precision: as for `quantized_matmul`.
      implementation: as for `transform_quantize`.

    Returns:
      (..., M, N), or for a tuple of weights that are not gated a tuple of them; with a residual a
      pair of that and x + residual.

    Raises:
      ValueError: shapes that do not fit, no weight, not two that are gated, or an unknown
        implementation.
      NotImplementedError: no permitted implementation can serve the call.
    """
    several: tuple = packed if isinstance(packed, tuple) else (packed,)
    if not several:
        raise ValueError("packed is an empty tuple; pass one weight or several")
    if fmt == "packed":
        if not hasattr(several[0], "input_format"):
            raise ValueError("packed is a bare weight: pass fmt, the format of the activations")
        fmt, global_scale = several[0].input_format, several[0].input_global_scale
    losses.check(precision)
    weights: tuple = tuple(getattr(p, "weight", p) for p in several)
    checks.operands(x, transform, fmt)
    checks.before(x, norm, residual)
    for weight in weights:
        checks.inner(x.shape, weight.shape)
    if gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise ValueError(
            f"gated takes two weights of one shape, not {[tuple(w.shape) for w in weights]}"
        )
    before = {"norm": norm, "residual": residual}
    products, total = _first_able(
        "transform_quantize_matmul",
        {
            "mosaic_gpu": functools.partial(
                matmul.layer, gated=gated, precision=precision, **before
            ),
            "xla": _read(before, xla.transform_quantize_matmul),
            "reference": _read(before, _short(reference.transform_quantize_matmul, precision)),
            "xla_fp8": _read(before, _short(xla_fp8.transform_quantize_matmul, precision)),
        },
        _ordered(x, weights, fmt, precision, gated) if implementation is None else implementation,
        lambda run: run(x, transform, weights, fmt, global_scale=global_scale, out_dtype=out_dtype),
    )
    if gated:
        y = products[0] if len(products) == 1 else reference.swiglu(*products)
    else:
        y = products if isinstance(packed, tuple) else products[0]
    return y if residual is None else (y, total)


def explain(x, packed, group_sizes=None) -> tuple[str, dict[str, str]]:
    """Return which implementation a layer runs, and why not those that stand before it.

    Args:
      x: (..., M, K), or its shape and dtype; nothing is computed.
      packed: as `transform_quantize_matmul` takes it, or its shapes.
      group_sizes: of a ragged layer, or their shape.

    Returns:
      A name, and the reasons of faster ones by theirs.
    """
    weights, fmt = (packed.weight,), packed.input_format
    reasons = {}
    dense = group_sizes is None
    for name in _ordered(x, weights, fmt, None, False) if dense else RAGGED:

        def call(x, packed, sizes, name=name):
            if not dense:
                return ragged_transform_quantize_matmul(x, packed, sizes, implementation=name)
            return transform_quantize_matmul(x, packed.transform, packed, implementation=name)

        try:
            jax.eval_shape(call, x, packed, group_sizes)
        except NotImplementedError as error:
            reasons[name] = str(error).partition(f"{name}: ")[2]
        else:
            return name, reasons
    raise NotImplementedError(f"no implementation serves this layer: {reasons}")


def ragged_transform_quantize_matmul(
    x, packed, group_sizes, *, out_dtype=None, implementation: Implementation = None
):
    """Return the quantized linear map of every row with the weight of its group.

    Args:
      x: (M, K), sorted by group.
      packed: weights stacked over G groups: an object with ``weight`` (G, N, K), ``input_format``,
        ``input_global_scale`` and ``transform``: (G, K/d, d, d) or (G, d, d), with one in place of
        G where all groups share it, (d, d), or None. A tuple of them multiplies the same quantized
        x; the first one's transform, format and scale count.
      group_sizes: (G,) integers; rows beyond their sum give zeros.
      out_dtype: of the result; default x's dtype.
      implementation: None chooses; a name, or names in order, forces: "mosaic_gpu" (weights laid
        out by `stacks.lay_out`, Hopper: those of groups without rows are not read), "xla"
        (`jax.lax.ragged_dot`), "reference" (one group after another).

    Returns:
      (M, N), or a tuple of them.

    Raises:
      ValueError: shapes that do not fit, no weight, or an unknown implementation.
      NotImplementedError: no permitted implementation can serve the call.
    """
    several: tuple = packed if isinstance(packed, tuple) else (packed,)
    if not several:
        raise ValueError("packed is an empty tuple; pass one weight or several")
    first, fmt = several[0], several[0].input_format
    if x.ndim != 2 or any(len(p.weight.shape) != 3 for p in several):
        shapes = [tuple(p.weight.shape) for p in several]
        raise ValueError(f"x {x.shape} must be (M, K) and weights {shapes} (G, N, K)")
    checks.operands(x, None, fmt)
    for p in several:
        checks.inner(x.shape, p.weight.shape[1:])
        checks.groups(group_sizes, p.weight.shape[0], len(x))
    transforms = of_groups(first.transform, *several[0].weight.shape[::2])
    products = _first_able(
        "ragged_transform_quantize_matmul",
        {
            "mosaic_gpu": ragged.layer,
            "xla": _one_by_one(xla_ragged.ragged_transform_quantize_matmul),
            "reference": _one_by_one(reference.ragged_transform_quantize_matmul),
        },
        implementation,
        lambda run: run(
            *(x, transforms, tuple(p.weight for p in several), group_sizes, fmt),
            global_scale=first.input_global_scale,
            out_dtype=out_dtype,
        ),
    )
    return products if isinstance(packed, tuple) else products[0]


def of_groups(transform, groups: int, k: int):
    """Return transforms as (G or 1, K/d or 1, d, d), or None."""
    if transform is None:
        return None
    shape, d = transform.shape, transform.shape[-1]
    if transform.ndim == 2:
        transform = transform[None, None]
    elif transform.ndim == 3 and shape[0] in (1, groups):
        transform = transform[:, None]
    fits = transform.ndim == 4 and transform.shape[0] in (1, groups) and shape[-2] == d
    if not (fits and k % d == 0 and transform.shape[1] in (1, k // d)):
        raise ValueError(
            f"packed.transform has shape {shape}; for {groups} groups and K={k} it must have a "
            f"leading axis of {groups}, or of 1 where all share it (`transform[None]`), before "
            "(K/d, d, d) or (d, d)"
        )
    return transform


def _short(run: Callable, precision) -> Callable:
    """An implementation that knows sums of two precisions; those of the others are float32."""
    return functools.partial(run, precision=precision)


def _one_by_one(run: Callable) -> Callable:
    """Let an implementation for one weight take several; compilers see that x is the same."""

    def call(x, transform, weights, *more, **options):
        return tuple(run(x, transform, weight, *more, **options) for weight in weights)

    return call


def _read(before: dict, run: Callable) -> Callable:
    """As `_one_by_one`, of what `normed.read` makes of x; the sum, too."""

    def call(x, *arguments, **options):
        x, total = normed.read(x, **before)
        return _one_by_one(run)(x, *arguments, **options), total

    return call


def _candidates() -> tuple[str, ...]:
    """What is tried, in order, where nothing is forced."""
    if jax.default_backend() == "gpu":
        return "mosaic_gpu", "xla", "reference"
    return "mosaic_gpu", "reference"  # "xla" gains nothing on a CPU


def _ordered(x, weights, fmt, precision, gated) -> tuple[str, ...]:
    """`_candidates` of a layer: the library's product first where a table says it is faster."""
    names = _candidates()
    packed = all(isinstance(weight, fragments.Fragments) for weight in weights)
    if not packed or jax.default_backend() != "gpu":
        return names
    choice = roads.allowed(weights, fmt, precision, gated=gated)
    device, tokens = jax.devices()[0].device_kind, math.prod(x.shape[:-1])
    library = roads.fastest(tokens, weights, fmt, device, choice) in roads.LIBRARY
    return ("xla_fp8", *names) if library else names


def _first_able(
    op: str, table: Mapping[str, Callable], implementation: Implementation, call: Callable
):
    """Call the first implementation that does not raise NotImplementedError."""
    names = list(table) if implementation is None else implementation
    names = [names] if isinstance(names, str) else names
    known = isinstance(names, Sequence) and all(isinstance(n, str) and n in table for n in names)
    if not known or not names:
        raise ValueError(
            f"implementation={implementation!r:.60} is unknown for {op}; choose from {[*table]}"
        )
    reasons = []
    for name in names:
        try:
            return call(table[name])
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(
        f"no implementation of {op} can serve this call: {'; '.join(reasons)}"
    )
