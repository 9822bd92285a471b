"""A whole model in, a quantized model and a report out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from wush_jax.calibration.host_memory import check_device_memory, within_memory
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import Call, Progress, Site, collect_moments, plain_call
from wush_jax.calibration.planning import ModelPlan, plan
from wush_jax.calibration.report import Report
from wush_jax.calibration.sequential import Sequential, quantize_sequentially
from wush_jax.calibration.steps import finish, measured_rows, quantize_planned
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.models.tokens import model_inputs
from wush_jax.solvers.recipe import Rules
from wush_jax.solvers.site import PackedWeight
from wush_jax.transforms.moments import Moments


def quantize_model(
    model: nnx.Module,
    batches: Iterable[Any],
    rules: Rules,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    sequential: Sequential | None = None,
    implementation: str | None = None,
    progress: Progress | None = None,
) -> tuple[nnx.Module, Report]:
    """Calibrate a model and quantize its dense layers; the original is left as it is.

    Args:
      model: an NNX module.
      batches: calibration inputs, read once; not needed by recipes that look at no data, but
        always used for the report.
      rules: as for `plan`.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.
      sequential: settings to calibrate layer after layer through what is already quantized; None
        calibrates all layers in one shot on the original model.
      implementation: of the quantized layers; None lets the dispatch choose.
      progress: called with the passes done, their total where it is known, and what is under way.

    Returns:
      The quantized model and a `Report` with the loss of every layer on the first batch.

    Raises:
      ValueError: as `plan`; no batches; what is no token of a language model; non-finite weights
        or activations, naming the layer; moments that cannot fit the devices' memory.
      MemoryError: it ran out on the way; with what was planned.

    >>> import jax
    >>> from wush_jax import Recipe
    >>> model = nnx.List([nnx.Linear(64, 32, rngs=nnx.Rngs(0))])
    >>> batch = jax.random.normal(jax.random.key(0), (128, 64))
    >>> quantized, report = quantize_model(model, [batch], Recipe(), call=lambda m, x: m[0](x))
    >>> type(quantized[0]).__name__, report.layers[0].path
    ('QuantizedDense', '0')
    """
    if sequential is not None:
        return quantize_sequentially(
            model,
            batches,
            rules,
            sequential,
            call=call,
            dense_types=dense_types,
            implementation=implementation,
            progress=progress,
        )
    batches = iter(model_inputs(model, batches) if call is plain_call else batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches is empty; pass at least one calibration batch")
    planned = plan(model, rules, first, call=call, dense_types=dense_types)
    check_device_memory(planned.report.details, sequential=False)
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    with within_memory(planned.report.details):
        moments = collect_moments(
            model,
            itertools.chain([first], batches),
            {item.site: item.moment_block for item in planned.sites},
            rows=planned.sample_rows,
            progress=progress,
            **options,
        )
        options["implementation"] = implementation
        return quantize_with(model, planned, moments, first, **options)


def quantize_with(
    model: nnx.Module,
    planned: ModelPlan,
    moments: Mapping[Site, Moments],
    batch: Any,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    implementation: str | None = None,
) -> tuple[nnx.Module, Report]:
    """Quantize a planned model from moments that were collected before.

    Args:
      model: the NNX module that was planned.
      planned: what `plan` returned.
      moments: of every planned site; full moments serve every recipe.
      batch: the batch on whose inputs the report's layer losses are measured.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.
      implementation: of the quantized layers.

    Returns:
      As `quantize_model`.
    """
    layers, _ = dense_layers(model, dense_types)
    packed: dict[str, PackedWeight] = {}
    for item in planned.sites:
        packed |= quantize_planned(item, layers, moments[item.site])
    sites = [item.site for item in planned.sites]
    losses = layer_losses(model, batch, sites, packed, call=call, dense_types=dense_types)
    rows = [
        row
        for item in planned.sites
        for row in measured_rows(item, layers, moments[item.site], losses)
    ]
    return finish(model, layers, packed, implementation, rows, planned.report)
