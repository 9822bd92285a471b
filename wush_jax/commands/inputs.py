"""What a run of ``wush quantize`` reads: calibration text or a saved calibration, and where to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from wush_jax.calibration.calibration import Calibration, calibrate
from wush_jax.calibration.observe import Progress
from wush_jax.calibration.token_weights import TokenWeights
from wush_jax.commands.options import Text, placement_of
from wush_jax.commands.terminal import console
from wush_jax.models.placement import Placement
from wush_jax.models.tokens import in_batches
from wush_jax.solvers.recipe import Rules


def calibration_batches(source: Text, model: Path) -> list[np.ndarray]:
    """Return the calibration batches of a text, and say what of it is left out."""
    windows = source.windows(model)
    console().print(f"calibration: {windows.said()}")
    if windows.left_out:
        console().print(f"{windows.left_out} tokens at the end fill no window; they are left out")
    return in_batches(windows.rows, source.batch)


def calibration_of(
    folder: Path | None,
    model: nnx.Module,
    batches: list,
    rules: Rules,
    token_weights: TokenWeights | None,
    update: Progress,
) -> Calibration | list:
    """Return what a run in one shot goes by: the batches, where nothing is kept or weighed.

    Args:
      folder: of a calibration, which is made where it is not there.
      model: the model.
      batches: of the text, if one is given.
      rules: what a calibration that is not kept has to serve.
      token_weights: as for `wush_jax.calibrate`.
      update: of the progress.

    Raises:
      ValueError: a folder of another text, or without the weights that are asked for.
    """
    options: Any = {"token_weights": token_weights, "progress": update}
    if folder is None:
        return batches if token_weights is None else calibrate(model, batches, rules, **options)
    if not folder.exists():
        made = calibrate(model, batches, **options)
        made.save(folder)
        return made
    found = Calibration.load(folder)
    if token_weights not in (None, found.token_weights):
        raise ValueError(
            f"--calibrated {folder} counts all tokens alike: leave --token-weights out, or give "
            "another folder"
        )
    same = len(batches) in (0, found.batches) and all(
        np.array_equal(batch, found.first) for batch in batches[:1]
    )
    if not same:
        raise ValueError(
            f"--calibrated {folder} is of another text, or of other windows: leave the text out, "
            "or give another folder"
        )
    return found


def divided(mesh: str | None, model: Path, data_parallel: bool) -> Placement:
    """Return where weights go on a mesh, refused before anything is read."""
    if mesh is not None and data_parallel:
        raise ValueError(
            f"--mesh {mesh} divides the weights and --data-parallel copies them: choose one"
        )
    return placement_of(mesh, model)


def spread(batches: list[np.ndarray]) -> tuple[NamedSharding, NamedSharding]:
    """Return the placement of a batch over all devices, and of weights on each of them."""
    devices = jax.device_count()
    uneven = [len(batch) for batch in batches if len(batch) % devices]
    if uneven:
        raise ValueError(
            f"a batch of {uneven[0]} windows is no multiple of {devices} devices; choose --batch "
            "and --samples that are"
        )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
