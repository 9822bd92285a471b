"""One of the processes of a calibration on several hosts; test_distributed runs it as a program.

Arguments: port, number of processes, own number, folder.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import BLOCKS, Blocks, codes

import wush_jax as wush

RECIPE = wush.Recipe()


def batches():
    """Two batches of correlated rows; every process takes its share of each."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((32, 32)) / 6
    return [np.float32(random.standard_normal((64, 32)) @ mixing) for _ in range(2)]


def calibrate(inputs, **settings):
    sequential = wush.Sequential(BLOCKS, granularity="layer", hidden_dtype="float32", **settings)
    return wush.quantize_model(Blocks(), inputs, RECIPE, sequential=sequential)


def main(port, count, own, folder):
    count, own, folder = int(count), int(own), Path(folder)
    jax.config.update("jax_disable_most_optimizations", True)  # what is compiled runs once
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, own)
    assert jax.device_count() == 2 * count
    mesh = jax.make_mesh((2 * count,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    share = [np.split(batch, count)[own] for batch in batches()]
    settings = {"sharding": sharding, "state_dir": folder / "state"}
    model, report = calibrate(share, **settings)
    found = codes(model)
    # One process has lost a layer: all have to go back to it.
    if own == count - 1:
        (folder / "state" / f"process-{own}" / "stage-00001.safetensors").unlink()
    again, resumed = calibrate(share, **settings, resume=True)
    assert resumed == report
    assert all(np.array_equal(found[path], other) for path, other in codes(again).items())
    # One shot, from batches that live on all processes.
    whole = [jax.make_array_from_process_local_data(sharding, part) for part in share]
    at_once, _ = wush.quantize_model(Blocks(), whole, RECIPE)
    found |= {f"at once {path}": value for path, value in codes(at_once).items()}
    np.savez(folder / f"codes-{own}.npz", **found)
    (folder / f"gains-{own}.json").write_text(
        json.dumps({layer.path: layer.predicted_gain for layer in report.layers})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
