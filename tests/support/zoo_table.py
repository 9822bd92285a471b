"""The table of docs/zoos.md: `python tests/support/zoo_table.py` writes what it sees anew.

With names of models as arguments only their rows are; those whose packages are missing stay.
"""

import sys
import tempfile
from pathlib import Path

import flax_models
import jax
import jax.numpy as jnp
import optax
import pytest
import zoo_models
from flax import nnx

import wush_jax as wush
from wush_jax.layers.finetune import pack, unpack
from wush_jax.layers.names import grouped_paths

PAGE = Path(wush.__file__).parents[1] / "docs" / "zoos.md"
CASES = {**zoo_models.CASES, **flax_models.CASES}
# Eight bits: what is wired wrongly is far off, what is rounded is not. A router that chooses other
# experts is another model.
INT8 = [(r".*router.*", None), (".*", wush.Recipe(wush.INT8, solver="rtn"))]
HEAD = (
    "| model | layers | of its matrices | left alone | plan | calibrate | quantize | run "
    "| save, load | fine-tune |\n|" + "---|" * 10
)


def planned(case):
    """A model, its report, and the first columns of its row; all its parameters are counted."""
    model = zoo_models.filled(case.make())
    report = wush.plan(model, INT8, case.batch, call=case.call).report
    counts = {k: v for k, v in report.details.items() if k.startswith("parameters_")}
    assert sum(counts.values()) == sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    quantized, alone = counts["parameters_quantized"], counts["parameters_left_alone"]
    names = ", ".join(f"`{name or 'model'}`" for name in grouped_paths(report.skipped))
    share = f"{100 * quantized / (quantized + alone):.0f} %"
    return model, [str(len(report.layers)), share, names]


def journey(case, folder):
    """Take a model all the way, and return its row."""
    model, columns = planned(case)
    run, target = nnx.jit(case.call), 1.5 * case.call(model, case.batch)
    exact = run(model, case.batch)
    calibration = wush.calibrate(model, [case.batch], INT8, call=case.call)
    quantized, _ = wush.quantize_model(model, calibration, INT8, call=case.call)
    y = run(quantized, case.batch)
    assert (y.shape, y.dtype) == (exact.shape, exact.dtype)
    assert 0 < _error(y, exact) < 0.01
    wush.save(folder / "model", quantized)
    for source in (model, nnx.eval_shape(case.make)):
        assert bool((run(wush.load(folder / "model", source), case.batch) == y).all())
    student = unpack(quantized, model)
    assert _error(run(student, case.batch), exact) < 0.01
    optimizer = nnx.Optimizer(student, optax.adam(1e-4), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, slope = nnx.value_and_grad(
            lambda model: jnp.mean((case.call(model, case.batch) - target) ** 2)
        )(model)
        optimizer.update(model, slope)
        return loss

    before = step(student, optimizer)
    assert float(step(student, optimizer)) < float(before)
    trained = run(pack(student), case.batch)
    assert _error(trained, target) < _error(y, target)
    return [*columns, *["yes"] * 6]


def _error(y, exact):
    return float(jnp.mean((y - exact) ** 2) / jnp.var(exact))


def row(name, columns):
    return f"| {name} | " + " | ".join(columns)


def main():
    for name in sys.argv[1:] or CASES:
        print(name, flush=True)
        try:
            case = CASES[name]()
        except pytest.skip.Exception as reason:
            print(f"  {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            write(row(name, journey(case, Path(folder))) + " |")


def write(line):
    """Put a row in its place, and the table in the order of the cases."""
    above, _, below = PAGE.read_text("utf8").partition(HEAD)
    lines = below.strip("\n").split("\n")
    rows = {old.split(" | ")[0]: old for old in lines if old.startswith("| ")}
    rows[line.split(" | ")[0]] = line
    table = [rows[f"| {name}"] for name in CASES if f"| {name}" in rows]
    rest = [text for text in lines if not text.startswith("| ")]
    PAGE.write_text(
        "\n".join([above + HEAD, *table, "", *rest[rest[:1] == [""] :], ""]), encoding="utf8"
    )


if __name__ == "__main__":
    main()
