"""A whole model in, a quantized model and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flax import nnx

from wush_jax.calibration.calibration import Calibration, observe, parts_of
from wush_jax.calibration.host_memory import check_device_memory, within_memory
from wush_jax.calibration.layer_run import Counter
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.observe import Call, Progress, plain_call, stacked
from wush_jax.calibration.pass_costs import StageCost, pass_costs, rows_of
from wush_jax.calibration.planning import ModelPlan, plan
from wush_jax.calibration.report import Report
from wush_jax.calibration.sequential import Sequential, quantize_sequentially
from wush_jax.calibration.site_plan import site_cost
from wush_jax.calibration.steps import alike, finish, measured_rows, quantize_all
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.solvers.recipe import Rules


def quantize_model(
    model: nnx.Module,
    batches: Iterable[Any] | Calibration,
    rules: Rules,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    sequential: Sequential | None = None,
    implementation: str | None = None,
    planned: ModelPlan | None = None,
    progress: Progress | None = None,
) -> tuple[nnx.Module, Report]:
    """Calibrate a model and quantize its dense layers; the original is left as it is.

    Args:
      model: an NNX module.
      batches: calibration inputs, read once; not needed by recipes that look at no data, but
        always used for the report. Or a `Calibration` of this model, which spares the observing.
      rules: as for `plan`.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.
      sequential: settings to calibrate layer after layer through what is already quantized; None
        calibrates all layers in one shot on the original model.
      implementation: of the quantized layers; None lets the dispatch choose.
      planned: what `plan` has said of this model and these rules, in one shot; None traces anew.
      progress: called with the passes done, their total where it is known, and what is under way;
        in one shot a batch is a pass, and a site. A method ``weigh`` is told what each costs:
        before the first where a plan and a sequence of batches are given, else before the sites.

    Returns:
      The quantized model and a `Report` with the loss of every layer on the first batch.

    Raises:
      ValueError: as `plan`; no batches; what is no token of a language model; non-finite weights
        or activations, naming the layer; moments that cannot fit the devices' memory; a
        calibration of another model, or one that keeps too little for these rules.
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
        if isinstance(batches, Calibration):
            raise ValueError(
                "batches is a Calibration, of the original model; sequential= observes each layer "
                "behind quantized ones: pass batches, or leave sequential out"
            )
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
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    count = Counter(progress)
    if isinstance(batches, Calibration):
        found = batches
    else:
        update = progress
        if planned is not None and isinstance(batches, Sequence):
            count.expect(_costs(model, planned, batches, dense_types))
            update = count.passed
        found = observe(model, batches, parts_of(rules), progress=update, **options)
        count.done = found.batches
    model = stacked(model, found.first, **options)
    if planned is None:
        planned = plan(model, rules, found, **options)
    if not count.total:
        count.expect(_costs(model, planned, [found.first] * count.done, dense_types))
    check_device_memory(planned.report.details, sequential=True)
    options |= {"implementation": implementation, "told": count}
    with within_memory(planned.report.details):
        return quantize_with(model, planned, found, **options)


def _costs(
    model: nnx.Module, planned: ModelPlan, batches: Sequence[Any], dense_types: DenseTypes
) -> list[float]:
    """Return the operations of every batch, and of every site in the order of `quantize_all`."""
    layers, _ = dense_layers(model, dense_types)
    sites = [site_cost(item, layers) for some in alike(planned.sites, layers) for item in some]
    weights = sum(layer.kernel.size for layer in layers.values())
    stage = StageCost([sites], weights, advances=False)
    observing = pass_costs([stage], [rows_of(batch) for batch in batches]) if batches else []
    return [*observing, *(float(site.solver_flops) for site in sites)]


def quantize_with(
    model: nnx.Module,
    planned: ModelPlan,
    calibration: Calibration,
    batch: Any = None,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    implementation: str | None = None,
    told: Callable[[str], None] | None = None,
) -> tuple[nnx.Module, Report]:
    """Quantize a planned model from what was calibrated before.

    Args:
      model: the NNX module that was planned.
      planned: what `plan` returned.
      calibration: of the model.
      batch: the batch on whose inputs the report's layer losses are measured; None takes the
        first that was calibrated on.
      call: how to run the model on a batch.
      dense_types: module types that are dense layers.
      implementation: of the quantized layers.
      told: called with the name of each site that is quantized.

    Returns:
      As `quantize_model`.

    Raises:
      ValueError: as `quantize_model`.
    """
    layers, _ = dense_layers(model, dense_types)
    calibration.check(model, layers, planned.sites)
    packed = quantize_all(planned.sites, layers, calibration.of, told=told)
    sites = [item.site for item in planned.sites]
    batch = calibration.first if batch is None else batch
    losses = layer_losses(model, batch, sites, packed, call=call, dense_types=dense_types)
    rows = [
        row
        for item in planned.sites
        for row in measured_rows(item, layers, calibration.of(item.site), losses)
    ]
    return finish(model, layers, packed, implementation, rows, planned.report)
