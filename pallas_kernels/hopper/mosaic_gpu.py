"""The door to the Mosaic GPU kernels: device, batching and sharding around one launch."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import normed, repack
from pallas_kernels.hopper import tiles as tile_tables

HOPPER = "9.0"


def require_hopper() -> str:
    """Return the device kind of the default Hopper GPU.

    Raises:
      NotImplementedError: there is none, or this jax has no Mosaic GPU for it.
    """
    version = jax.__version_info__
    if version < (0, 11):
        raise NotImplementedError(f"Mosaic GPU kernels need jax 0.11, this is {jax.__version__}")
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU; the backend is {jax.default_backend()}")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "unknown")
    if capability != HOPPER:
        raise NotImplementedError(
            f"needs compute capability {HOPPER} (wgmma); {device.device_kind} has {capability}; "
            "Blackwell is compile-tested only: `mosaic_gpu.launch(..., unit='mma')`"
        )
    return device.device_kind


def on_hopper() -> bool:
    """Whether the default device is one that these kernels run on."""
    try:
        require_hopper()
    except NotImplementedError:
        return False
    return True


def transform_quantize(x, transform, fmt, *, global_scale, layout, norm=None, residual=None):
    """Run `quantize_kernel` on the default GPU, for any leading axes.

    Args:
      x: (..., M, K).
      transform: (K/d, d, d), (d, d) or None.
      fmt: the number format.
      global_scale: float32 scalar; None takes the format's constant.
      layout: "interchange", "kernel", "lanes", "float8" or "values" (bfloat16 values times g in
        place of codes), see `quantize_kernel.transform_quantize`.
      norm: (weight (K,), eps), of what is transformed.
      residual: like x, added before that.

    Returns:
      Codes uint8 (..., M, K/2), scales (..., M, K/g), or transposed in the kernel layout, and the
      sum, (..., M, K).

    Raises:
      NotImplementedError: what the kernel, the device or this jax does not cover.
    """
    device = require_hopper()
    how = {"global_scale": global_scale, "layout": layout, "device": device}
    if not reads(x, norm, fmt):
        x, total = normed.read(x, norm, residual)
        return *launch(x, transform, fmt, **how), total
    return launch(x, transform, fmt, norm=norm, residual=residual, **how)


def reads(x, norm, fmt) -> bool:
    """Whether the quantizer normalises, and adds a residual, by itself.

    For few tokens, and in formats with powers of two: NVFP4's was no faster so.
    """
    few = math.prod(x.shape[:-1]) <= tile_tables.FEW_TOKENS
    return norm is not None and few and fmt.scale_dtype == "e8m0"


def launch(
    x,
    transform,
    fmt,
    *,
    global_scale,
    layout,
    device,
    tiles=None,
    unit="wgmma",
    interpret=False,
    after=(),
    norm=None,
    residual=None,
):
    """As `transform_quantize`, for a named device, with given tiles, or interpreted on CPU.

    Arrays ``after`` are there before it starts. Then the next kernel, one of this package that
    takes the results as they are, may start while it runs, and read them.

    ``unit="mma"`` uses warp-level matrix instructions in place of Hopper's wgmma: with it the
    kernel compiles for Blackwell (sm_100a), where it was never run.

    With a norm, where it `reads`, the result is codes, scales and the sum of x and residual.
    """
    from pallas_kernels.hopper import quantize_kernel

    quantize_kernel.check_supported(x.reshape(-1, x.shape[-1]), transform, fmt)
    if layout == "values" and fmt.element.name not in ("e2m1", "int4_full"):
        raise NotImplementedError(f"values of {fmt.name} are no bfloat16 numbers")
    wide = fmt.element.name == "e4m3"
    if layout == "float8" and not wide and (fmt.element.name, fmt.scale_dtype) != ("e2m1", "e8m0"):
        raise NotImplementedError(f"{fmt.name} is not exact in FP8")
    if wide and layout not in repack.POWERED:
        raise NotImplementedError(f"the kernel has no codes of {fmt.name} in the layout {layout!r}")
    if global_scale is None:
        global_scale = fmt.global_scale
    if global_scale is None:
        raise NotImplementedError(f"{fmt.name} derives its global scale from the data: pass one")
    if math.prod(jnp.shape(global_scale)) != 1:
        raise NotImplementedError(
            f"global_scale has shape {jnp.shape(global_scale)}: the kernel takes one for all rows"
        )
    if layout in repack.TRANSPOSED and x.ndim != 2:
        raise NotImplementedError(f"layout={layout!r} is for x (M, K), got {x.shape}: flatten it")
    if transform is None:
        # Blocks as small as the groups: an infinity stays in its own group.
        transform = jnp.eye(min(fmt.group_size, repack.CHUNK), dtype=x.dtype)
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    d, shared = transform.shape[-1], transform.ndim == 2
    if tiles is None:
        tiles = tile_tables.choose(rows, width, fmt, d, shared, layout, device)
    first = None if norm is None else (norm[1], residual is not None)
    statics = (fmt, layout, tiles, unit, interpret, first, len(after) > 0)
    g = jnp.asarray(global_scale, jnp.float32).reshape(())
    more = () if norm is None else (norm[0],)
    more += () if residual is None else (residual.reshape(rows, width),)
    codes, scales, *sums = _batched(statics)(x.reshape(rows, width), transform, g, *more, *after)
    if x.ndim > 2:
        codes, scales = (a.reshape(*x.shape[:-1], -1) for a in (codes, scales))
    if norm is None:
        return codes, scales
    return codes, scales, sums[0].reshape(x.shape) if sums else x


def _alone(statics):
    """What others than the kernels of this package read: the next kernel starts after the end."""
    return *statics[:-1], False


def _batched(statics):
    """Under vmap, fold mapped rows into M; map over anything else one by one."""
    run, layout = custom_vmap(functools.partial(_sharded, statics)), statics[1]

    @run.def_vmap
    def rule(size, mapped, x, *others):
        call = _batched(_alone(statics))
        plain = layout not in repack.TRANSPOSED and statics[-2] is None
        if plain and mapped[0] and not any(mapped[1:]):
            codes, scales = call(x.reshape(-1, x.shape[-1]), *others)
            lead = x.shape[:-1]
            return (codes.reshape(*lead, -1), scales.reshape(*lead, -1)), (True, True)
        operands = (x, *others)

        def one(i):
            return call(*(o[i] if m else o for o, m in zip(operands, mapped, strict=True)))

        out = jax.lax.map(one, jnp.arange(size))
        return out, (True,) * len(out)

    return run


def _sharded(statics, x, transform, g, *others):
    """The kernel on each shard of the rows; the other axes are gathered first."""
    return _partitioned(statics, x, transform, g, *others)


@functools.partial(custom_partitioning, static_argnums=(0,))
def _partitioned(statics, x, transform, g, *after):
    from pallas_kernels.hopper import norm_kernel, quantize_kernel

    fmt, layout, tiles, unit, interpret, first, early = statics
    if first is not None:
        weight, residual, after = after[0], after[1] if first[1] else None, after[1 + first[1] :]
        out = norm_kernel.transform_quantize(
            *(x, residual, weight, transform, fmt),
            eps=first[0],
            global_scale=g,
            layout=layout,
            interpret=interpret,
            after=after,
            early=early,
        )
        return out if first[1] else out[:2]
    return quantize_kernel.transform_quantize(
        *(x, transform, fmt),
        global_scale=g,
        layout=layout,
        tiles=tiles,
        unit=unit,
        interpret=interpret,
        after=after,
        early=early,
    )


def _row_shardings(statics, mesh, arguments):
    spec = arguments[0].sharding.spec
    # Powers are padded: their rows stay together.
    rows = spec[0] if spec and statics[1] not in repack.POWERED else None
    scales = (None, rows) if statics[1] == "kernel" else (rows, None)
    named = functools.partial(NamedSharding, mesh)
    of_rows = named(PartitionSpec(rows, None))
    added = _added(statics)
    outputs = of_rows, named(PartitionSpec(*scales)), *[of_rows] * added
    inputs = [of_rows, *[named(PartitionSpec())] * (len(arguments) - 1)]
    inputs[RESIDUAL : RESIDUAL + added] = [of_rows] * added
    return tuple(inputs), outputs


RESIDUAL = 4  # its place among the arguments, if there is one


def _added(statics) -> bool:
    return statics[-2] is not None and statics[-2][1]


def _infer(statics, mesh, arguments, result):
    return _row_shardings(statics, mesh, arguments)[1]


def _partition(statics, mesh, arguments, result):
    inputs, outputs = _row_shardings(statics, mesh, arguments)
    return mesh, functools.partial(_partitioned.fun, _alone(statics)), outputs, inputs


def _rule(statics, mesh, arguments, result):
    block = "b i j" if len(arguments[1].shape) == 3 else "i j"
    powered = statics[1] in repack.POWERED
    scales = "q r" if powered else "q m" if statics[1] == "kernel" else "m q"
    codes = "s p" if powered else "m p"
    places = itertools.count()
    others = [" ".join(f"w{next(places)}" for _ in a.shape) for a in arguments[3:]]
    sums = ""
    if _added(statics):
        others[RESIDUAL - 3], sums = "m k", ", m k"
    return f"{', '.join(['m k', block, '', *others])} -> {codes}, {scales}{sums}"


_partitioned.def_partition(
    partition=_partition, infer_sharding_from_operands=_infer, sharding_rule=_rule
)
