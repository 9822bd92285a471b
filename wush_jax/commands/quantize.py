"""``wush plan`` and ``wush quantize``."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from pallas_kernels.exactly import is_sum_of_parts
from wush_jax.calibration.model import quantize_model
from wush_jax.calibration.observe import Progress
from wush_jax.calibration.planning import ModelPlan, packed_of
from wush_jax.calibration.planning import plan as plan_model
from wush_jax.calibration.promise import Limit
from wush_jax.calibration.report import Report
from wush_jax.calibration.sequential import Sequential
from wush_jax.calibration.streaming import quantize_folder
from wush_jax.calibration.token_weights import TokenWeights
from wush_jax.checkpoints import checkpoint
from wush_jax.checkpoints.quantization_config import records_to_json
from wush_jax.checkpoints.targets import TARGETS
from wush_jax.commands.inputs import calibration_batches, calibration_of, divided, spread
from wush_jax.commands.model_free import ModelFree
from wush_jax.commands.options import (
    FORMATS,
    HEAD,
    PRESETS,
    Head,
    Preset,
    RecipeFlags,
    ResearchFlags,
    Source,
    TextFlags,
    preset_of,
    rules_of,
)
from wush_jax.commands.promise import check_limit, keep_promise, write_certificate
from wush_jax.commands.run_log import RunLog
from wush_jax.commands.terminal import console, progress
from wush_jax.layers.served import served_line, served_plan
from wush_jax.models.hugging_face import FolderTensors, abstract_of, load_pretrained
from wush_jax.models.misfits import check_all_finite
from wush_jax.solvers.costs import SiteCost
from wush_jax.solvers.recipe import Recipe, Rules
from wush_jax.storage.folder_writer import check_companions, check_replaceable, copy_companions

Model = tyro.conf.Positional[Path]
Free = Annotated[ModelFree, tyro.conf.arg(name="model-free")]
TargetLayout = Literal[tuple(TARGETS)]  # type: ignore[valid-type]  # made of the names there
Target = Annotated[TargetLayout | None, tyro.conf.arg(name="for")]  # type: ignore[valid-type]
NOTHING: Any = {}
SKIP = ("lm_head",)


def plan(
    model: Model,
    *,
    preset: Preset | None = None,
    recipe: RecipeFlags = NOTHING,
    research: ResearchFlags = NOTHING,
    skip: tuple[str, ...] = SKIP,
    head: Head | None = None,
    target: Target = None,
    all_layers: bool = False,
) -> None:
    """Say what would be quantized and how, and what it takes; no weight is read.

    Args:
      model: folder with config.json and safetensors files.
      preset: recipe that the flags below change; without one "best", the least loss that is known,
        or, where --transform, --solver or --for says more, "rtn", which takes seconds.
      recipe: what most people change.
      research: what researchers change: the parts of the presets.
      skip: regular expressions of module paths that stay as they are.
      head: quantize the head, too: w4a8 rounds its weights to the format, its inputs to FP8.
      target: a layout of other libraries: sets formats and rules for ``wush export`` to it.
      all_layers: a row for every layer, not one for those alike.
    """
    rules = rules_of(preset, {**recipe, **research}, skip, target, head)
    _show(_planned(model, rules).report, skip, all_layers)


def quantize(
    model: Model,
    *,
    out: Path,
    source: Source = TextFlags(),  # noqa: B008  # frozen
    preset: Preset | None = None,
    recipe: RecipeFlags = NOTHING,
    research: ResearchFlags = NOTHING,
    skip: tuple[str, ...] = SKIP,
    head: Head | None = None,
    target: Target = None,
    calibration: Literal["sequential", "one-shot"] = "sequential",
    granularity: Literal["site", "layer"] = "site",
    calibrated: Path | None = None,
    token_weights: TokenWeights | None = None,
    max_kl: float | None = None,
    max_bits: float | None = None,
    max_bytes: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    data_parallel: bool = False,
    mesh: str | None = None,
    dry_run: bool = False,
    resume: bool = False,
    all_layers: bool = False,
    free: Free = ModelFree(),  # noqa: B008  # frozen
) -> None:
    """Quantize a Hugging Face model folder; write OUT/checkpoint, OUT/report.json, OUT/plot.png.

    OUT/run.jsonl has what was asked, versions, the device, and what each step took as it goes.

    Args:
      model: folder with config.json and safetensors files.
      out: folder for the results.
      source: calibration text.
      preset: recipe that the flags below change; without one "best", the least loss that is known,
        or, where --transform, --solver or --for says more, "rtn", which takes seconds.
      recipe: what most people change.
      research: what researchers change: the parts of the presets.
      skip: regular expressions of module paths that stay as they are.
      head: quantize the head, too: w4a8 rounds its weights to the format, its inputs to FP8.
      target: a layout of other libraries: sets formats and rules for ``wush export`` to it.
      calibration: layer after layer, one of them in memory; or in one shot on the whole model.
      granularity: layer after layer, whether each site sees the sites before it quantized.
      calibrated: folder of a calibration, in one shot: used where it is there, with no text, or the
        same; else made, for every recipe, and kept.
      token_weights: gradient counts tokens by what the model's prediction makes of its layers'
        outputs, in one shot: less KL, for a backward pass over the text.
      max_kl: stay within this KL from the model, in nats, with the fewest bytes, in one shot; the
        recipe's flags then do not matter. OUT/checkpoint/promise.json has it: `wush verify`.
      max_bits: in place of --max-kl, the least KL with so many bits a weight, transforms counted.
      max_bytes: in place of --max-kl, the least KL with so many bytes of quantized layers.
      dtype: of activations and products; weights keep the types that their files have.
      data_parallel: spread each batch over all devices.
      mesh: divide the weights over devices: model=N.
      dry_run: say what would be done, and do nothing.
      resume: continue a run that was interrupted, layer after layer.
      all_layers: show a row for every layer, not one for those alike.
      free: without a model and a text.
    """
    recipe = {**recipe, **research}  # type: ignore[typeddict-item]  # all fields of a recipe
    if free.model_free:
        given: dict[str, Any] = {"text": source.text or None, "tokens": source.tokens}
        given |= {"calibrated": calibrated, "max-kl": max_kl, "mesh": mesh}
        given |= {"max-bits": max_bits, "max-bytes": max_bytes, "head": head}
        given |= {"token-weights": token_weights, "data-parallel": data_parallel}
        free.check_no_calibration({**given, "calibration one-shot": calibration == "one-shot"})
        rules = free.rules(preset, recipe, skip, target)
        _show(_model_free(free, model, out, rules, target, resume, dry_run), skip, all_layers)
        return
    rules = rules_of(preset, recipe, skip, target, head)
    if dry_run:
        _show(_planned(model, rules).report, skip, all_layers)
        return
    sequential, state = calibration == "sequential", out / "layers"
    _check_place(out, state, sequential, resume)
    _check_copies(model, out / "checkpoint")
    limit = Limit(max_kl, max_bits, max_bytes)
    _check_one_shot(sequential, calibrated, token_weights, limit)
    weights = divided(mesh, model, data_parallel)
    reused = calibrated is not None and calibrated.exists()
    texts = bool(source.text) or source.tokens is not None
    batches = calibration_batches(source, model) if texts or not reused else []
    rows, weights = spread(batches) if data_parallel and batches else (None, weights)
    planned = _with_cost(_planned(model, rules), preset_of(preset, recipe, target))
    asked = {"model": model, "text": source.text, "tokens": source.tokens, "seed": source.seed}
    log = RunLog(out, rules, **asked, calibration=calibration, dtype=dtype, **asdict(limit))
    options: dict[str, Any] = {"dtype": jnp.dtype(dtype), "sharding": weights}
    with progress() as shown:
        update = log.following(shown)
        if sequential:
            settings = Sequential(
                granularity=granularity, state_dir=state, resume=resume, sharding=rows
            )
            options |= {"settings": settings, "planned": planned, "progress": update}
            report = quantize_folder(model, out / "checkpoint", batches, rules, **options)
        else:
            inputs: Any = [jax.device_put(batch, rows) for batch in batches]
            check_all_finite(FolderTensors(model), model)
            whole = load_pretrained(model, param_dtype=None, **options)
            inputs = calibration_of(calibrated, whole, inputs, rules, token_weights, update)
            report = _in_one_shot(whole, inputs, planned, rules, limit, out / "checkpoint", update)
            copy_companions(model, out / "checkpoint")
    log.end(report)
    report.to_json(out / "report.json")
    report.plot(out / "plot.png")
    shutil.rmtree(state, ignore_errors=True)
    _show(report, skip, all_layers)
    if not limit.given:  # which chooses other recipes than were planned
        console().print(served_line(served_plan(packed_of(planned), jnp.dtype(dtype))))


def _model_free(
    free: ModelFree, model: Path, out: Path, rules: Rules, target: Any, resume: bool, dry_run: bool
) -> Report:
    """Round a folder, or say what that would do."""
    if dry_run:
        return free.run(model, out, rules, target, resume=resume, dry_run=True)
    _check_place(out, out / "layers", True, resume)
    log = RunLog(out, rules, model=model, layout=target)
    report = free.run(model, out, rules, target, resume=resume, dry_run=False)
    log.end(report)
    return report


def _in_one_shot(
    whole: nnx.Module,
    inputs: Any,
    planned: ModelPlan,
    rules: Rules,
    limit: Limit,
    out: Path,
    update: Progress,
) -> Report:
    """Quantize a whole model, within a limit where one is given, and write it."""
    certificate = None
    if not limit.given:
        options: dict[str, Any] = {"planned": planned, "progress": update}
        quantized, report = quantize_model(whole, inputs, rules, **options)
    else:
        quantized, report, certificate = keep_promise(whole, inputs, rules, limit)
    checkpoint.save(out, quantized)
    write_certificate(out, certificate)
    return report


def _check_one_shot(
    sequential: bool, calibrated: Path | None, token_weights: str | None, limit: Limit
) -> None:
    """Refuse limits that are none, and layer after layer what only one shot can do."""
    check_limit(limit, sequential)
    if sequential and calibrated is not None:
        raise ValueError("--calibrated is for --calibration one-shot: sequential observes anew")
    if sequential and token_weights is not None:
        raise ValueError(
            "--token-weights is for --calibration one-shot: gradients come back through the whole "
            "model, of which sequential holds one layer"
        )
    if token_weights is not None and limit.given and calibrated is None:
        raise ValueError(
            f"--token-weights and --{next(iter(limit.given)).replace('_', '-')}: add --calibrated "
            "FOLDER, which keeps what every candidate needs"
        )


def _check_place(out: Path, state: Path, sequential: bool, resume: bool) -> None:
    """Refuse, before anything is read, a place that cannot be written or holds another run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if resume and not sequential:
        raise ValueError("--resume is for --calibration sequential: one shot keeps no layers")
    if state.exists() and not resume:
        raise ValueError(
            f"{state} holds a run that is at work or did not end: add --resume (and no "
            "--calibration one-shot) to continue it, or choose another --out"
        )


def _check_copies(model: Path, checkpoint: Path) -> None:
    """Refuse what could not be written, or copied beside it, after all the work."""
    check_companions(model)
    check_replaceable(checkpoint, {"quantization_config": records_to_json({})})


def _planned(model: Path, rules: Rules) -> ModelPlan:
    """Trace a model of shapes alone."""
    whole = abstract_of(FolderTensors(model), dtype=jnp.float32)
    pairs = [] if isinstance(rules, Recipe) else rules
    head = any(pattern == HEAD and recipe is not None for pattern, recipe in pairs)
    if whole.config.tie_word_embeddings and head:
        raise ValueError(
            f"--head: the head of {model} is its embedding (tie_word_embeddings), which stays as "
            "it is; leave --head out"
        )
    planned = plan_model(whole, rules, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    names = dict.fromkeys(p.weight.format.name for p in packed_of(planned).values())
    for name in names:
        if is_sum_of_parts(FORMATS[name]):
            console().print(
                f"{name} weights are multiplied as sums of bfloat16 numbers, slower than BF16 for "
                "many tokens; take NVINT4 or MXFP4 where prompts count"
            )
    return planned


def _with_cost(planned: ModelPlan, preset: str) -> ModelPlan:
    """Return a plan, having said what its solver takes beside the quickest preset."""
    if preset == "rtn":
        return planned
    rtn, shapes = PRESETS["rtn"], [row.shape for row in planned.report.layers]
    least = sum(SiteCost(rtn, shape[-1], (math.prod(shape),)).solver_flops for shape in shapes)
    cost = planned.report.details["solver_flops"]
    console().print(
        f"preset {preset}: {cost:.1e} operations in the solver, {cost / least:.0f} times those of "
        "--preset rtn, which rounds and loses more; --preset paper is between them"
    )
    return planned


def _show(report: Report, skip: tuple[str, ...], all_layers: bool) -> None:
    """Print a report; the rules that nobody has given are not said to be without a layer."""
    own = (*(SKIP if skip == SKIP else ()), ".*")
    report = replace(report, unused_rules=[r for r in report.unused_rules if r not in own])
    for name, value in report.details.items():
        console().print(f"{name}: {value:,}")
    console().print(report.table(all_layers))
