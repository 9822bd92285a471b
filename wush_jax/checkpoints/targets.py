"""Recipes that a layout can hold: what it sets, and what it cannot be given, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wush_jax.checkpoints.layouts import compressed_tensors, fp_quant
from wush_jax.checkpoints.layouts.faults import format_fault
from wush_jax.formats import MXFP4, NVFP4
from wush_jax.solvers.recipe import DATA_FREE, Recipe

ROUND_175 = MXFP4.replace(rule="round_175", global_scale=1.0)
#: What a recipe has to have for a layout, by field.
TARGETS: Mapping[str, Mapping[str, Any]] = {
    compressed_tensors.NV: {"format": NVFP4, "activation_format": "same"},
    compressed_tensors.MX: {
        "format": ROUND_175,
        "activation_format": "same",
        "transform_dtype": "float32",
    },
    fp_quant.NAME: {
        "format": MXFP4,
        "activation_format": "same",
        "transform_dtype": "bfloat16",
    },
}


def recipe_for(layout: str, preset: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe whose result a layout can hold.

    Args:
      layout: one of `TARGETS`; it sets formats, rules and the type of transforms.
      preset: the recipe for everything else.
      changes: fields that were asked for; they go before the layout's.

    Raises:
      ValueError: what the layout cannot hold of it, all of it, and what to change.

    >>> recipe_for("nvfp4-pack-quantized", Recipe(), {"transform": "hadamard"}).format.name
    'NVFP4'
    """
    wanted = dict(TARGETS[layout])
    if layout == compressed_tensors.MX and changes.get("format") == MXFP4:
        changes = {**changes, "format": ROUND_175}  # the only MXFP4 that it holds
    fields = {**wanted, **changes}
    faults = []
    transform = fields.get("transform", preset.transform)
    shared = fields.get("shared_blocks", preset.shared_blocks)
    if layout != fp_quant.NAME and not shared and transform not in ("identity", "hadamard"):
        remedy = ["--shared-blocks, or --transform hadamard (identity for transformers)"]
        remedy += ["--no-block-gain"] if fields.get("block_gain", preset.block_gain) else []
        remedy += ["--refit 0"] if fields.get("refit", preset.refit) else []
        faults.append(
            f"transform={transform!r} has a matrix for each block, and the layout room for one: "
            + " ".join(remedy)
        )
        fields |= {"transform": "hadamard"}
    if not faults and (shared or transform in DATA_FREE):
        faults += [
            f"{name} needs a transform for each block: {flag}"
            for name, flag in (("block_gain", "--no-block-gain"), ("refit", "--refit 0"))
            if fields.get(name, getattr(preset, name))
        ]
    if faults:  # what else is wrong is told of a recipe that can be
        fields |= {"block_gain": False, "refit": 0}
    recipe = preset
    try:
        recipe = preset.replace(**fields)
        faults += _format_faults(layout, recipe)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError(
            f"--for {layout} cannot hold this recipe: {'; '.join(faults)}. Or leave --for out and "
            "keep the native layout"
        )
    return recipe


def _format_faults(layout: str, recipe: Recipe) -> list[str]:
    if layout == fp_quant.NAME:
        weights: tuple = tuple(fp_quant.DTYPES.values())
        inputs: tuple = (NVFP4 if recipe.format.scale_dtype == "e4m3" else MXFP4,)
    else:
        weights, inputs = (TARGETS[layout]["format"],), compressed_tensors.INPUTS[layout]
    faults = []
    for fmt, known, what in (
        (recipe.format, weights, "weight"),
        (recipe.input_format, inputs, "activation"),
    ):
        reason = format_fault(fmt, known, what)
        if reason is not None:
            faults.append("it " + reason.replace("{layer}", "the recipe"))
    if recipe.shared_blocks and not recipe.share_transform:
        faults.append("q, k and v go through one matrix there: --share-transform")
    if recipe.format.global_scale is None and not recipe.share_transform:
        faults.append("a global scale from data is one for q, k and v: --share-transform")
    return faults
