"""A folder of safetensors files of any architecture in, a quantized folder out: no model, no text.

Every matrix is rounded to nearest, one after the other, some rows at a time: the memory holds one
quantized matrix and a few megabytes. Finished matrices wait on disk in the files of the run's
state, from which the folder is put together at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.calibration.observe import Progress
from wush_jax.calibration.report import LayerReport, Report
from wush_jax.calibration.resume import RunState, digest
from wush_jax.calibration.rounding import Scales, round_matrix, run_time, stacked
from wush_jax.checkpoints.content import library_version, written
from wush_jax.checkpoints.interchange import WRITABLE
from wush_jax.checkpoints.layouts import LAYOUTS
from wush_jax.checkpoints.layouts.layout import Content
from wush_jax.checkpoints.layouts.wush import LAYOUT as NATIVE
from wush_jax.checkpoints.matrices import Matrix, check_orientation, elements, find_matrices
from wush_jax.checkpoints.packed_layout import record_of
from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.checkpoints.readers import notes
from wush_jax.formats import QuantizedArray
from wush_jax.formats.format import SCALE_DTYPES
from wush_jax.models.encodings import ENCODINGS, DecodedFolder, open_folder
from wush_jax.solvers.recipe import DATA_FREE, Recipe, RuleBook, Rules
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.folder_writer import (
    SHARD_BYTES,
    check_companions,
    check_replaceable,
    companions,
    copy_companions,
    write_folder,
)
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import INDEX, TensorFolder, some

SCALE_OF_INPUTS = (
    "inputs are divided by a constant where their format has one ({}): larger ones than its scales "
    "reach saturate, which only a calibration can see; activation_format=None leaves inputs as "
    "they are"
)


def round_folder(
    source: str | Path,
    out: str | Path,
    rules: Rules,
    *,
    layout: str = "wush",
    rotated: bool = False,
    turned: Sequence[str] | None = None,
    state_dir: str | Path | None = None,
    resume: bool = False,
    shard_bytes: int = SHARD_BYTES,
    plan_only: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Round every matrix of a folder of safetensors files to nearest, whatever the architecture.

    ``Q = q(W T_W^T)`` with the identity, a Hadamard matrix or a random rotation: nothing looks at
    inputs, so that losses are those of such recipes and `wush_jax.calibration.quantize_folder`
    has better ones for models that it knows. Names and shapes alone say what is a matrix
    (`wush_jax.checkpoints.matrices`); everything else is copied as it is, with its type, and so
    are the config, the tokenizer and the like. Nothing of the folder is executed.

    Args:
      source: folder with ``config.json`` and safetensors files, one or several with their index;
        weights of `wush_jax.models.encodings` (FP8, GPTQ, AWQ, ...) are decoded one by one.
      out: folder to write; as for `wush_jax.save`.
      rules: as for `wush_jax.plan`, over names in the files without ``.weight``; recipes that round
        to nearest and look at no data.
      layout: as for `wush_jax.checkpoints.export`.
      rotated: likewise.
      turned: regular expressions of tensors that hold (K, N), as GPT-2's do. None refuses folders
        where the model's width says that some do; an empty list takes all as (N, K).
      state_dir: where finished matrices are kept until the end, which takes it away; None is beside
        ``out``.
      resume: continue a run that was interrupted, to the same bytes.
      shard_bytes: the largest size of a file.
      plan_only: check everything and say what would be done, without reading weights.
      progress: called as ``progress(done, total, what)``, in MiB of weights.

    Returns:
      The `Report`: layers with the error of their weights, and of all other tensors the reason.

    Raises:
      ValueError: a folder that is quantized already, rules with other recipes, a layout that cannot
        hold the result: all before any work. A weight that is not finite, with its name.
      OSError: the state or the folder cannot be written; finished matrices are kept.

    Source: WUSH paper, eq. 1 (RTN).

    >>> import tempfile
    >>> from wush_jax.storage.folder_writer import write_folder
    >>> tensors = {"up.weight": np.ones((8, 64), np.float32), "norm.weight": np.ones(64, "f4")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_folder(f"{folder}/in", tensors, {"model_type": "any"})
    ...     report = round_folder(f"{folder}/in", f"{folder}/out", Recipe(transform="hadamard"))
    >>> [layer.path for layer in report.layers], report.skipped
    (['up'], {'norm.weight': 'no matrix: one axis, or none'})
    """
    run = _Rounding(open_folder(source, mapped=True), rules, layout, turned)
    content = run.content(run.planned())
    config = written(content, LAYOUTS[layout], rotated=rotated)[1]
    said = (*run.notes(), *notes(content, layout))
    check_companions(source)
    check_replaceable(Path(out), config)
    if plan_only:
        return run.report({}, said)
    beside = Path(out).resolve().with_name(f".{Path(out).resolve().name}.rounding")
    folder = Path(beside if state_dir is None else state_dir)
    with closing(RunState(folder, run.fingerprint(), resume=resume)) as state:
        layers = run.rounded(state, progress)
        errors = {name: float(found["error"]) for name, found in layers.items()}
        tensors, config = written(run.content(layers), LAYOUTS[layout])
        framework = None if layout == NATIVE.name else "pt"
        write_folder(out, tensors, config, shard_bytes=shard_bytes, framework=framework)
    copy_companions(source, out)
    state.remove()
    return run.report(errors, said)


class _Rounding:
    """The matrices of a folder on their way to another one."""

    def __init__(self, folder: TensorFolder, rules: Rules, layout: str, turned):
        _check(folder, rules, layout)
        self.folder, self.rules, self.layout = folder, rules, layout
        stacks = layout == NATIVE.name
        self.matrices, self.kept = find_matrices(
            folder.entries, rules, turned=turned or (), stacks=stacks
        )
        if turned is None:
            check_orientation(self.matrices, folder.config)
        for matrix in self.matrices if not stacks else ():
            if matrix.turned:
                self.kept[matrix.tensor] = "it holds (K, N), which readers of the layout do not"
        self.matrices = [m for m in self.matrices if m.tensor not in self.kept]
        if not self.matrices:
            raise ValueError(
                f"{folder.path} has no matrix that the rules quantize; what there is: "
                f"{some(f'{name}: {why}' for name, why in self.kept.items())}"
            )
        self.turned = sorted(turned or ())

    def fingerprint(self) -> dict[str, str]:
        """Return what the finished matrices depend on."""
        stored = self.folder.stored if isinstance(self.folder, DecodedFolder) else self.folder
        values = (
            stored.read(name, [entry.dtype], [entry.shape])
            for name, entry in stored.entries.items()
        )
        return {
            "model": digest(values),
            "matrices": f"{[(m.name, m.turned) for m in self.matrices]}",
            "rules": repr(self.rules),
        }

    def _read(self, name: str) -> np.ndarray:
        entry = self.folder.entries[name]
        return self.folder.read(name, [entry.dtype], [entry.shape])

    def planned(self) -> dict[str, dict[str, np.ndarray]]:
        """Return arrays of the right shapes and types that take no memory."""
        found = {}
        for matrix in self.matrices:
            *lead, k = matrix.shape
            fmt = matrix.recipe.format
            shapes: dict[str, tuple[tuple[int, ...], Any]] = {
                "codes": ((*lead, k * fmt.element.bits // 8), np.uint8),
                "scales": ((*lead, fmt.groups(k)), SCALE_DTYPES[fmt.scale_dtype]),
            }
            zeros = {
                key: np.broadcast_to(np.zeros((), dtype), shape)
                for key, (shape, dtype) in shapes.items()
            }
            scale = 1.0 if fmt.global_scale is None else fmt.global_scale
            found[matrix.name] = {**zeros, "global_scale": np.full(lead[:-1], scale, np.float32)}
        return found

    def rounded(self, state: RunState, progress: Progress | None) -> dict[str, dict]:
        """Return the finished matrices, which lie in the files of the state."""
        total = sum(elements(m) for m in self.matrices)
        scales, done = Scales(self.matrices, self._values), 0

        def tell(matrix: Matrix, more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(-(-done // 2**20), -(-total // 2**20), matrix.name)

        for stage, matrix in enumerate(self.matrices):
            tell(matrix, 0)
            if state.has(stage):
                tell(matrix, elements(matrix))
            else:
                values = self._values(matrix)
                parts = [
                    round_matrix(rows, matrix, scale, partial(tell, matrix))
                    for rows, scale in zip(values, scales(matrix), strict=True)
                ]
                state.save_tensors(stage, stacked(parts, matrix))
        return {m.name: state.tensors(stage) for stage, m in enumerate(self.matrices)}

    def _values(self, matrix: Matrix) -> list[np.ndarray]:
        """Return each of a tensor's matrices (N, K), which stay in the file."""
        whole = self._read(matrix.tensor)
        whole = whole.mT if matrix.turned else whole
        return [*whole] if whole.ndim == 3 else [whole]

    def content(self, layers: Mapping[str, Mapping[str, np.ndarray]]) -> Content:
        """Return what there is to write, for matrices that are rounded, or planned."""
        packed: dict[str, PackedWeight] = {}
        records: dict[str, LayerRecord] = {}
        first: dict[Any, str] = {}
        for matrix in self.matrices:
            found, recipe = layers[matrix.name], matrix.recipe
            site, transform = None, None
            if recipe.transform != "identity":
                site = first.setdefault(matrix.site, matrix.name)
                transform = packed[site].transform if site in packed else run_time(matrix)
            weight = QuantizedArray(
                found["codes"],  # type: ignore[arg-type]  # numpy's
                found["scales"],  # type: ignore[arg-type]
                found["global_scale"],  # type: ignore[arg-type]
                recipe.format,
            )
            one = PackedWeight(weight, transform, None, recipe.input_format)  # type: ignore[arg-type]
            packed[matrix.name], records[matrix.name] = one, record_of(matrix.name, one, site)
        plain = {name: self._read(name) for name in self.kept}
        extra = {
            "library": f"wush_jax {library_version()}",
            "naming": "hugging_face",
            "metadata": {"calibration": "none, rounded to nearest"},
        }
        config = {k: v for k, v in self.folder.config.items() if k != "quantization_config"}
        return Content(packed, records, plain, config, extra)

    def notes(self) -> Iterator[str]:
        """Yield what the result lacks beside a calibrated one, and what was not copied."""
        inputs = {m.recipe.input_format for m in self.matrices}
        constant = {f.name for f in inputs if f is not None and f.scale_dtype == "e4m3"}
        if isinstance(self.folder, DecodedFolder):
            yield from self.folder.notes
        if constant:
            yield SCALE_OF_INPUTS.format(", ".join(sorted(constant)))
        read = {CONFIG, INDEX, *companions(self.folder.path)}
        read |= {entry.file.name for entry in self.folder.entries.values()}
        others = sorted(file.name for file in self.folder.path.iterdir())
        others = [name for name in others if name not in read and not name.startswith(".")]
        if others:
            yield f"not copied: {', '.join(others)}"

    def report(self, errors: Mapping[str, float], said: Sequence[str]) -> Report:
        """Return what was done, or would be."""
        names = [m.name for m in self.matrices]
        kept = [name.removesuffix(".weight") for name in self.kept]
        rows = [_row(m, self.folder, errors.get(m.name)) for m in self.matrices]
        others = sum(self.folder.entries[name].nbytes for name in self.kept)
        details = {"bytes_left_alone": others}
        unused = RuleBook(self.rules).unused([*names, *kept])
        return Report(rows, self.kept, unused, details, said)


def _check(folder: TensorFolder, rules: Rules, layout: str) -> None:
    """Refuse, all at once, what can be refused by looking at arguments and the config."""
    faults = []
    if layout not in WRITABLE:
        faults.append(f"layout={layout!r} cannot be written; choose from {', '.join(WRITABLE)}")
    if "quantization_config" in folder.config and not isinstance(folder, DecodedFolder):
        faults.append(
            f"{folder.path / CONFIG} has a quantization_config: it is quantized already; give the "
            f"folder of the original model, or one of {', '.join(ENCODINGS)}"
        )
    RuleBook(rules)  # their form
    pairs = [(".*", rules)] if isinstance(rules, Recipe) else rules
    for pattern, recipe in pairs:
        if recipe is None:
            continue
        for name, fits, remedy in (
            ("transform", DATA_FREE, "'hadamard' or 'identity'"),
            ("global_scale", ("constant",), "'constant'"),
            ("solver", ("rtn",), "'rtn'"),
        ):
            if (value := getattr(recipe, name)) not in fits:
                faults.append(
                    f"rules[{pattern!r}] has {name}={value!r}, which needs a calibration; without "
                    f"one there is {remedy}"
                )
    if faults:
        raise ValueError("; ".join(faults))


def _row(matrix: Matrix, folder: TensorFolder, error: float | None) -> LayerReport:
    recipe, inputs = matrix.recipe, matrix.recipe.input_format
    count = elements(matrix)
    after = count * recipe.format.bits_per_value / 8
    if recipe.transform != "identity":
        width = jnp.dtype(recipe.transform_dtype).itemsize
        after += width * recipe.block**2 * count // (matrix.shape[-1] * matrix.shape[-2])
    return LayerReport(
        path=matrix.name,
        site=matrix.name,
        shape=matrix.shape,
        format=f"{recipe.format.name}/{'none' if inputs is None else inputs.name}",
        transform=recipe.transform,
        solver="rtn",
        block=recipe.block,
        bytes_before=folder.entries[matrix.tensor].nbytes,
        bytes_after=int(after),
        weight_error=error,
    )
