"""How scalars and shared memory reach inlined code: the seam between Pallas and `quad`."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.hopper.quad import i32, run

ROWS = 64  # of a warpgroup's instruction
SCALAR = plgpu.Layout.WGMMA.reduce(1)


def scalars(values) -> list:
    """Float32 scalars as operands of a kernel."""
    return [jnp.asarray(value, jnp.float32).reshape(1) for value in values]


def named(operands, powered: bool) -> tuple:
    """Sort a product's operands behind x.

    Args:
      operands: powers of two, if there are; records, units and global scales of each weight; a
        divisor; the result.
      powered: whether there are powers.

    Returns:
      Powers or None; tuples of records, units and global scales; divisor; result.
    """
    powers, *others = operands if powered else (None, *operands)
    count = (len(others) - 2) // 3
    return powers, *(tuple(others[i * count : (i + 1) * count]) for i in range(3)), *others[-2:]


def spread(value):
    """A scalar as an array, since only arrays and references go into inlined code."""
    return plgpu.layout_cast(lax.broadcast(jnp.asarray(value), (ROWS,)), SCALAR)


def lane_value(array):
    """The lane's value of an array that is equal everywhere."""
    register = array.registers.flat[0]
    if isinstance(register.type, ir.VectorType):
        return vector.extract(register, [], [0])
    return register


def address(ref) -> ir.Value:
    """Where a reference to shared memory starts, 32 bits."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def generic_address(ref) -> ir.Value:
    """Where a reference to any memory starts, 64 bits."""
    generic = llvm.addrspacecast(llvm.PointerType.get(), utils.memref_ptr(ref))
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), generic)


def wait_for_kernel_before():
    """Wait for the end of the kernel before, which may still run when this one starts.

    Without it a kernel is launched when the one before has ended. What is read before it must have
    been in memory when that one started.
    """
    plgpu.griddepcontrol_wait()

    @plgpu.inline_mgpu()
    def fence(_):  # once more, for compilers: what reads memory stays behind it
        run("griddepcontrol.wait;")

    fence()


def cluster_arrive():
    """Say that this thread runs; who needs all of the cluster waits with `CLUSTER_WAIT`."""

    @plgpu.inline_mgpu()
    def arrive(_):
        run("barrier.cluster.arrive.release.aligned;")

    arrive()


CLUSTER_WAIT = "barrier.cluster.wait.acquire.aligned;"


def cluster_sync():
    """Let all threads of a cluster wait for each other."""

    @plgpu.inline_mgpu()
    def sync(_):
        run("barrier.cluster.arrive.relaxed.aligned;")
        run("barrier.cluster.wait.acquire.aligned;")

    sync()


def swizzled(swizzle: int, itemsize: int) -> tuple:
    """The transforms of an operand in shared memory: tiles of 8 rows, swizzled by so many bytes."""
    # Their abstract methods are stubs.
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
