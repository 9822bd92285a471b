"""Work on replicated arrays is done once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from wush_jax.calibration.replicas import on_one_device

pytestmark = pytest.mark.usefixtures("eight_devices")


def over(*axes, first=0):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[first:8]), ("x",), (AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def devices_of(function, *trees):
    """On how many devices the function's arguments were, and what was returned."""
    seen = []

    def call(*arguments):
        leaves = jax.tree.leaves(arguments)
        seen.append({len(x.sharding.device_set) for x in leaves if isinstance(x, jax.Array)})
        return function(*arguments)

    found = on_one_device(call, *trees)
    return seen[0], found


def test_replicated_arrays_are_worked_on_once():
    x = jax.device_put(jnp.arange(8.0), over())
    used, found = devices_of(lambda x, y, z: {"sum": x + y["w"], "z": z}, x, {"w": jnp.ones(8)}, 3)
    assert used == {1}
    assert found["sum"].sharding == over()
    np.testing.assert_array_equal(found["sum"], np.arange(8) + 1)


def test_what_was_one_array_stays_one():
    x = jax.device_put(jnp.arange(8.0), over())
    _, (a, b, c) = devices_of(lambda x: (y := 2 * x, y, 3 * x), x)
    assert a is b
    assert c is not a


def test_the_device_is_one_of_the_mesh():
    x = jax.device_put(jnp.arange(8.0), over(first=4))
    elsewhere = jax.device_put(jnp.ones(8), SingleDeviceSharding(jax.devices()[0]))
    _, found = devices_of(jnp.add, x, elsewhere)
    assert found.sharding == over(first=4)


@pytest.mark.parametrize("spec", [("x",), None])
def test_other_arrays_stay_where_they_are(spec):
    x = jnp.arange(8.0) if spec is None else jax.device_put(jnp.arange(8.0), over(*spec))
    used, found = devices_of(lambda x: 2 * x, x)
    assert used == {len(x.sharding.device_set)}
    assert found.sharding == x.sharding
