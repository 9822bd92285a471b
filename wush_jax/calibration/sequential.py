"""Calibration layer after layer: every site sees what the layers quantized before it put out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from wush_jax.calibration.host_memory import check_device_memory, check_host_memory, within_memory
from wush_jax.calibration.layer_run import (
    Counter,
    LayerRun,
    Sequential,
    finished_stages,
    load_stage,
    local_sites,
    stage_note,
)
from wush_jax.calibration.layer_run import Stack as Stack
from wush_jax.calibration.observe import Call, Progress, plain_call
from wush_jax.calibration.pass_costs import pass_costs, rows_of
from wush_jax.calibration.planning import plan
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.resume import RunState, digest, model_digest
from wush_jax.calibration.sites import inputs_of
from wush_jax.calibration.steps import finish
from wush_jax.formats.checks import check_kind
from wush_jax.layers.nnx import DENSE_TYPES, DenseTypes, dense_layers
from wush_jax.layers.swap import swap
from wush_jax.models.tokens import check_batches_given, model_inputs
from wush_jax.solvers.recipe import Rules
from wush_jax.solvers.site import PackedWeight


def quantize_sequentially(
    model: nnx.Module,
    batches: Iterable[Any],
    rules: Rules,
    settings: Sequential,
    *,
    call: Call = plain_call,
    dense_types: DenseTypes = DENSE_TYPES,
    implementation: str | None = None,
    progress: Progress | None = None,
) -> tuple[nnx.Module, Report]:
    """Quantize a model layer after layer; dense layers outside the stack come last.

    The inputs of the current layer stay on the host, in chunks as the batches come. Layers of
    equal shape share their compiled functions. With a ``state_dir`` every finished layer is on
    disk; a resumed run recomputes the hidden states through them and ends with the same bytes.

    Args:
      model: an NNX module with a stack of layers.
      batches: calibration inputs; kept in memory.
      rules: as for `wush_jax.plan`.
      settings: see `Sequential`.
      call: how to run the whole model on a batch.
      dense_types: module types that are dense layers.
      implementation: of the quantized layers.
      progress: called as ``progress(done, total, what)``, in passes over a chunk.

    Returns:
      The quantized model and a `Report`; losses are on the first batch.

    Raises:
      ValueError: as `wush_jax.quantize_model`; a model without the stack; state of another run;
        what cannot fit the memory of the host or the devices.
      OSError: the state cannot be written; what was done is kept.

    Source: WUSH paper, algorithm 2 and section 5 (calibration order).
    """
    check_kind(nnx.Module, "an NNX module", model=model)
    check_batches_given(batches)
    batches = list(model_inputs(model, batches) if call is plain_call else batches)
    if not batches:
        raise ValueError("batches is empty; pass at least one calibration batch")
    stack = settings.stack
    layers = getattr(model, stack.layers, None)
    if layers is None or not len(layers):
        raise ValueError(
            f"model {type(model).__name__} has no layers in .{stack.layers}{_lists(model)}; "
            f"{_remedy(stack)}"
        )
    _check_stack(model, settings.stack, batches[0])
    options: dict[str, Any] = {"call": call, "dense_types": dense_types}
    planned = plan(model, rules, batches[0], **options)
    stages = [local_sites(planned, f"{stack.layers}.{i}.") for i in range(len(layers))]
    inside = {f"{stack.layers}.{i}.{s.site.name}" for i, local in enumerate(stages) for s in local}
    rest = [item for item in planned.sites if item.site.name not in inside]
    run = LayerRun(settings, dense_types, implementation, Counter(progress))
    run.count.expect(_costs(run, model, layers, stages, rest, batches))
    check_host_memory(model, batches, stack.embed, settings.hidden_dtype)
    check_device_memory(planned.report.details, sequential=True)
    memory = within_memory(planned.report.details)
    with _open_state(model, batches, rules, settings) as state, memory:
        done = finished_stages(state, len(layers))
        hidden = [run.embed(model, batch) for batch in batches]
        rows: list[LayerReport] = []
        finished: dict[str, PackedWeight] = {}
        for index, (layer, local) in enumerate(zip(layers, stages, strict=True)):
            prefix = f"{stack.layers}.{index}."
            dense, _ = dense_layers(layer, dense_types)
            if state is not None and index < done:
                packed, new_rows = load_stage(state, index, local, dense)
                run.count.done += len(run.passes(local)) * len(batches)
            else:
                packed, new_rows = run.quantize_layer(layer, local, hidden, prefix)
                if state is not None:
                    state.save(index, packed, stage_note(packed, new_rows))
            rows += new_rows
            finished |= {prefix + path: p for path, p in packed.items()}
            if index + 1 < len(layers):
                hidden = run.advance(swap(layer, dense, packed, implementation), hidden)
    everything, _ = dense_layers(model, dense_types)
    if rest:
        half = swap(model, everything, finished, implementation)
        chunks = run.chunks(batches, "outside the layers")
        packed, new_rows = run.quantize_stage(half, everything, rest, chunks, batches[0], **options)
        finished |= packed
        rows += new_rows
    return finish(model, everything, finished, implementation, rows, planned.report)


def _check_stack(model: nnx.Module, stack: Stack, batch: Any) -> None:
    """Refuse a model whose first layer its stack does not run, abstractly."""
    graph, state = nnx.split(model)

    def run(state: Any, batch: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, state)
        hidden = stack.embed(model, batch)
        # A function of the caller's own is traced where it is needed.
        usual = stack.layer is plain_call
        return hidden, stack.layer(getattr(model, stack.layers)[0], hidden) if usual else hidden

    try:
        hidden, out = jax.eval_shape(run, state, inputs_of(batch))
        fault = (
            ""
            if np.shape(hidden) == np.shape(out)
            else f"a layer makes {np.shape(out)} of {np.shape(hidden)}"
        )
    except Exception as error:  # whatever a model's own code trips over
        fault = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if fault:
        raise ValueError(
            f"sequential.stack does not run {type(model).__name__}: {fault}; {_remedy(stack)}"
        )


def _remedy(stack: Stack) -> str:
    return (
        f"describe its Stack by wush_jax.calibration.Stack(layers={stack.layers!r}, "
        "embed=lambda model, batch: the first layer's input, layer=lambda layer, hidden: its "
        "output, of the same shape), with positions and masks made inside of layer, or calibrate "
        "in one shot"
    )


def _lists(model: nnx.Module) -> str:
    """Say which attributes of a model hold several modules of one class."""
    found = [
        f".{name} has {len(value)} of {type(value[0]).__name__}"
        for name, value in vars(model).items()
        if isinstance(value, (nnx.List, list, tuple))
        and len(value) > 1
        and isinstance(value[0], nnx.Module)
        and len(set(map(type, value))) == 1
    ]
    return f" ({', '.join(found)})" if found else ""


def _costs(run: LayerRun, model, layers, stages, rest, batches) -> list[float]:
    """Return what each pass of each batch costs."""
    costs = [
        run.cost(layer, local, together=False, advances=layer is not layers[-1])
        for layer, local in zip(layers, stages, strict=True)
    ]
    costs += [run.cost(model, rest, together=True, advances=False)] if rest else []
    return pass_costs(costs, [rows_of(batch) for batch in batches])


@contextlib.contextmanager
def _open_state(model, batches, rules, settings: Sequential) -> Iterator[RunState | None]:
    """Give the run its folder, where it wants one, and let go of it in the end."""
    if settings.state_dir is None:
        yield None
        return
    fingerprint = {
        "model": str(model_digest(model)),
        "batches": digest(jax.tree.leaves(batches)),
        "rules": repr(rules),
        "settings": f"{settings.granularity} {settings.hidden_dtype}",
    }
    folder = Path(settings.state_dir)
    if jax.process_count() > 1:
        folder /= f"process-{jax.process_index()}"
    with contextlib.closing(RunState(folder, fingerprint, resume=settings.resume)) as state:
        yield state
