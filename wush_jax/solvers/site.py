"""One site at a time: weights, moments and a recipe in, packed weights out.

The only place that turns the names of a recipe into transforms and solvers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fragments import Fragments
from pallas_kernels.stacks import Stack
from wush_jax import transforms
from wush_jax.formats import Format, QuantizedArray, dequantize
from wush_jax.formats.checks import check_arrays, check_kind
from wush_jax.formats.partition import Partition
from wush_jax.solvers import noise, ranges, scale_search
from wush_jax.solvers.gptq import gptq
from wush_jax.solvers.recipe import Recipe
from wush_jax.solvers.refit import Aim, refit_rounds
from wush_jax.solvers.rtn import rtn
from wush_jax.solvers.site_input import Known, known_input
from wush_jax.solvers.site_transform import TransformRule, build_transform
from wush_jax.transforms import BlockTransform, Moments
from wush_jax.transforms.sample import Sample

# Of GPTQ under jit: how many dampings were tried, and whether all is finite.
Notes = list[tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight with what its inputs need at run time: a pytree.

    ``y = dequantize(q(x T_X^T)) @ dequantize(weight)^T``

    Attributes:
      weight: (N, K) in transformed coordinates: a `QuantizedArray`, or `Fragments` where the
        matmul kernels are to read it; of experts (E, N, K), or `pallas_kernels.stacks.Stack`.
      transform: T_X, (K/d, d, d), or (d, d) shared by all blocks, or None for the identity.
      input_global_scale: global scale of the activations, float32 scalar, or None for the format's.
      input_format: format of the activations, or None to leave them unquantized; static.
      partition: how the weight is divided over a mesh whose devices run the kernels each on its
        part; None for a weight of one device, or one that the compiler divides; static.
    """

    weight: QuantizedArray | Fragments | Stack
    transform: jax.Array | None
    input_global_scale: jax.Array | None
    input_format: Format | None = field(metadata={"static": True})
    partition: Partition | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.weight.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its transform."""
        return self.weight.nbytes + (0 if self.transform is None else self.transform.nbytes)

    @property
    def interchange(self) -> QuantizedArray:
        """The weight as codes and scales, which files hold."""
        if isinstance(self.weight, QuantizedArray):
            return self.weight
        return _interchange(self.weight)


@jax.jit
def _interchange(weight: Fragments | Stack) -> QuantizedArray:
    return QuantizedArray(*weight.interchange, weight.global_scale, weight.format)


def quantize_weight(
    weight: jax.Array,
    activation_moment: Moments | jax.Array | None,
    recipe: Recipe,
    *,
    transform: BlockTransform | None = None,
    sample: Sample | None = None,
    name: str = "weight",
) -> PackedWeight:
    """Quantize one layer's weight under a recipe.

    Args:
      weight: W (N, K), outputs first.
      activation_moment: M_X of the layer's input, full (K, K) or diagonal blocks (K/d, d, d); GPTQ
        needs it full; may be None where neither the transform nor the solver looks at data. Or the
        `Moments` that `wush_jax.calibrate_layer` gives: M_X and the sample together.
      recipe: what to do.
      transform: the pair to use in place of the recipe's, such as one shared by a site; already
        rounded to its run-time dtype.
      sample: rows of the layer's input; recipes with ``block_gain`` or ``input_error="sample"``
        need them; in place of those in the moments.
      name: of the layer, for messages.

    Returns:
      `PackedWeight` (N, K).

    Raises:
      ValueError: wrong shapes or orientation, a block that does not divide K, non-finite values, a
        moment or sample that the recipe needs and that is missing, empty or not full, a Hessian
        that is not positive definite.

    Source: WUSH paper, eq. 5-8, algorithms 1 and 2.

    Layers of one shape and recipe compile once; with GPTQ that takes many seconds.

    With `Moments`, which know the input's largest magnitude, a constant global scale that would
    saturate or lose its digits is another one, as in a model (`wush_jax.solvers.ranges`); not under
    `jax.jit`, which sees no values.

    >>> w = jax.random.normal(jax.random.key(0), (8, 64))
    >>> quantize_weight(w, jnp.eye(64), Recipe()).shape
    (8, 64)
    """
    known = activation_moment

    def solve(recipe: Recipe) -> list[PackedWeight]:
        return [
            _quantize_alone(weight, known, recipe, transform=transform, sample=sample, name=name)
        ]

    return _in_range(solve, recipe, [weight], known)[0]


def _in_range(
    solve: Callable[[Recipe], list[PackedWeight]],
    recipe: Recipe,
    weights: Sequence[jax.Array],
    moments: Moments | jax.Array | None,
) -> list[PackedWeight]:
    """Solve with global scales that fit, where what they have to fit is known."""
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((weights, moments)))
    if not isinstance(moments, Moments) or not isinstance(recipe, Recipe) or traced:
        return solve(recipe)
    return ranges.in_range(solve, recipe, weights, moments)


def _quantize_alone(
    weight: jax.Array,
    moments: Moments | jax.Array | None,
    recipe: Recipe,
    *,
    transform: BlockTransform | None = None,
    sample: Sample | None = None,
    name: str = "weight",
    notes: Notes | None = None,
) -> PackedWeight:
    """As `quantize_weight`, for `quantize_site`, which may take notes."""
    check_arrays(weight=weight)
    check_kind(Recipe, "a Recipe, such as wush_jax.PAPER", recipe=recipe)
    if transform is not None:
        check_kind(BlockTransform, "a BlockTransform, or None", transform=transform)
    recipe = recipe.fitted(weight.shape[-1] if weight.shape else 0)  # no axes: refused below
    known = known_input([weight], moments, sample, recipe, built=transform is not None)
    blocks, sample = known.blocks, known.sample
    solver_transform: BlockTransform | TransformRule | None = transform
    if transform is None:
        own = TransformRule.of(recipe)
        built = None if recipe.interleaved else build_transform([weight], blocks, recipe, sample)
        solver_transform = own if built is None else built
    quantized, used = _solve(weight, known, solver_transform, recipe, name, notes)
    return _packed(quantized, used, blocks, recipe)


def quantize_site(
    weights: Sequence[jax.Array],
    activation_moment: Moments | jax.Array | None,
    recipe: Recipe,
    *,
    sample: Sample | None = None,
    names: Sequence[str] | None = None,
    notes: Notes | None = None,
) -> list[PackedWeight]:
    """Quantize all weights that share one input, with one transform.

    Each layer's moment is first scaled to unit output power ``tr(M_W M_X) = 1``: without that a
    layer with large weights would decide the transform for its neighbours. A global scale derived
    from data is one for the site.

    Args:
      weights: (N_i, K) each.
      activation_moment: as for `quantize_weight`.
      recipe: for all of them; ``share_transform=False`` gives each its own transform.
      sample: as for `quantize_weight`.
      names: of the layers, for messages.
      notes: as for `wush_jax.solvers.gptq.gptq`; one for each run of GPTQ.

    Returns:
      One `PackedWeight` per weight. With a shared transform they hold the same array.

    Raises:
      ValueError: as for `quantize_weight`.
    """

    def solve(recipe: Recipe) -> list[PackedWeight]:
        return _quantize_site(weights, activation_moment, recipe, sample, names, notes)

    return _in_range(solve, recipe, weights, activation_moment)


def _quantize_site(weights, activation_moment, recipe, sample, names, notes):
    """As `quantize_site`, with the constants of the recipe."""
    names = [f"weights[{i}]" for i in range(len(weights))] if names is None else names
    if not recipe.share_transform or len(weights) == 1:
        return [
            _quantize_alone(w, activation_moment, recipe, sample=sample, name=name, notes=notes)
            for w, name in zip(weights, names, strict=True)
        ]
    recipe = recipe.fitted(weights[0].shape[-1])
    known = known_input(weights, activation_moment, sample, recipe)
    blocks = known.blocks
    transform = build_transform(weights, blocks, recipe, known.sample)
    if recipe.solver == "rtn" and recipe.format.global_scale is not None:
        # Rows do not know of each other: one weight at a time takes less memory.
        alone = [
            _solve(w, known, transform, recipe, n)[0] for w, n in zip(weights, names, strict=True)
        ]
        whole = _packed(alone[0], transform, blocks, recipe)
        return [replace(whole, weight=quantized) for quantized in alone]
    together = jnp.concatenate(weights)
    quantized, used = _solve(together, known, transform, recipe, ", ".join(names), notes)
    stops = np.cumsum([w.shape[0] for w in weights])
    rows = [slice(stop - w.shape[0], stop) for w, stop in zip(weights, stops, strict=True)]
    whole = _packed(quantized, used, blocks, recipe)
    return [
        replace(
            whole, weight=replace(quantized, codes=quantized.codes[r], scales=quantized.scales[r])
        )
        for r in rows
    ]


def _solve(weight, known: Known, transform, recipe: Recipe, name: str, notes=None):
    """Run the recipe's solver: the quantized weight and the transform that was used."""
    if recipe.solver == "rtn":
        quantized = _rtn(
            weight,
            transform,
            recipe.format,
            scales=recipe.scale_search,
            activation_moment=known.blocks,
        )
        transforms.check_finite(f"transformed {name}", quantized.scales.astype(jnp.float32))
        return quantized, transform
    hessian, cross, pairs = _quantized_moments(known, transform, recipe)
    quantized, used = gptq(
        weight,
        hessian,
        transform,
        recipe.format,
        block_size=recipe.block,
        damping=recipe.damping,
        scales=recipe.scale_search,
        cross_moment=cross,
        pairs=pairs,
        descent=recipe.descent,
        activation_order=recipe.activation_order,
        dtype=recipe.solver_dtype,
        name=name,
        notes=notes,
    )
    if not recipe.refit:
        return quantized, used
    return refit_rounds(
        quantized,
        used,
        weight.astype(jnp.float32),
        lambda moved: Aim(*_quantized_moments(known, moved, recipe)),
        rounds=recipe.refit,
        damping=recipe.damping,
        descent=recipe.descent,
    )


def _quantized_moments(known: Known, transform, recipe: Recipe):
    """GPTQ's Hessian, cross moment and pairs; None for what the recipe does not look at."""
    fmt = recipe.input_format
    if recipe.input_error == "ignore" or fmt is None:
        return known.moment, None, None
    assert known.blocks is not None  # GPTQ without a moment was refused
    if recipe.input_error == "model":
        return *_with_modelled_noise(known.moment, known.blocks, transform, fmt), None
    assert known.sample is not None  # as well
    scale = scale_search.input_global_scale(
        fmt, activation_moment=known.blocks, transform=transform.activation
    )
    return _with_sampled_noise(known.moment, known.sample, transform, fmt, scale)


@functools.partial(jax.jit, static_argnames="fmt")
def _with_modelled_noise(moment, blocks, transform, fmt: Format):
    return noise.with_noise(moment, noise.modelled_noise(blocks, transform, fmt))


@functools.partial(jax.jit, static_argnames="fmt")
def _with_sampled_noise(moment, sample, transform, fmt: Format, scale):
    pairs = noise.quantized_pairs(sample, transform, fmt, scale)
    return *noise.with_noise(moment, noise.sampled_noise(sample, transform, fmt, scale)), pairs


# One compilation a shape: step by step the temporaries of a large layer would not fit.
_rtn = jax.jit(rtn, static_argnames=("fmt", "scales"))


def _packed(quantized, transform: BlockTransform, blocks, recipe: Recipe) -> PackedWeight:
    run_time = None if recipe.transform == "identity" else transform.activation
    fmt = recipe.input_format
    input_scale = None
    if blocks is not None:
        # Without a moment a derived scale stays None: found anew for each batch at run time.
        input_scale = scale_search.input_global_scale(
            fmt, activation_moment=blocks, transform=run_time
        )
    return PackedWeight(quantized, run_time, input_scale, fmt)


def effective_weight(packed: PackedWeight) -> jax.Array:
    """Return the weight in its original coordinates: ``dequantize(weight) T_X``, (N, K)."""
    values = dequantize(packed.weight)
    if packed.transform is None:
        return values
    return transforms.apply_transform(values, packed.transform.astype(jnp.float32).mT)
