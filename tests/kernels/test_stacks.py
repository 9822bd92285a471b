"""Experts' weights as records, and which tile of rows belongs to which expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wush_jax as wush
from pallas_kernels import fragments, reference, stacks
from pallas_kernels.hopper import group_tiles

pytestmark = pytest.mark.once

E, N, K = 3, 70, 160
WEIGHTS = np.random.default_rng(0).standard_normal((E, N, K)).astype(np.float32)


def stacked(fmt):
    each = [wush.quantize(w, fmt) for w in WEIGHTS]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@pytest.mark.parametrize(
    ("fmt", "operand"), [(wush.MXFP4, "float8"), (wush.MXFP4, "bfloat16"), (wush.NVFP4, "bfloat16")]
)
def test_records_of_each_expert_are_its_own(fmt, operand):
    q = stacked(fmt)
    laid = stacks.lay_out(q, operand)
    assert laid.shape == (E, N, K)
    assert laid.grid == (2, 2)
    for e in range(E):
        alone = fragments.lay_out(jax.tree.map(lambda leaf, e=e: leaf[e], q), operand)
        np.testing.assert_array_equal(laid.records[e], alone.records)
        assert laid.unit[e] == alone.unit
    np.testing.assert_array_equal(
        jax.vmap(wush.dequantize)(q),
        jax.vmap(fmt.decode)(
            fmt.unpack(laid.interchange[0]), laid.interchange[1], laid.global_scale
        ),
    )
    assert laid.nbytes == laid.records.nbytes + 8 * E


def test_what_is_no_stack_of_experts_has_no_records():
    q = stacked(wush.MXFP4)
    with pytest.raises(NotImplementedError, match=r"a stack is \(G, N, K\)"):
        stacks.lay_out(jax.tree.map(lambda leaf: leaf[0], q))
    with pytest.raises(NotImplementedError, match="not exact in FP8"):
        stacks.lay_out(stacked(wush.NVFP4), "float8")
    with pytest.raises(NotImplementedError, match=r"stacks\.lay_out"):
        stacks.check((q,))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_elsewhere_others_serve_records(implementation):
    weight = stacked(wush.MXFP4)
    x = np.random.default_rng(1).standard_normal((9, K)).astype(np.float32)
    sizes = np.int32([4, 0, 3])
    packed = wush.PackedWeight(weight, None, None, wush.MXFP4)
    laid = dataclasses.replace(packed, weight=stacks.lay_out(weight, "float8"))
    wanted, got = (
        wush.quantized_ragged_dot(x, p, sizes, implementation=implementation)
        for p in (packed, laid)
    )
    np.testing.assert_array_equal(got, wanted)
    loss = jax.grad(lambda x, p: wush.quantized_ragged_dot(x, p, sizes).sum())
    np.testing.assert_array_equal(loss(x, laid), loss(x, packed))


SIZES = ([4, 0, 3], [0, 0, 0], [0, 20, 0], [9, 1, 8], [20, 0, 0], [0, 0, 20], [8, 8, 4])


@pytest.mark.parametrize("height", [1, 8, 16])
def test_every_row_is_in_one_tile_of_its_group(height):
    rows = 20
    find = jax.jit(
        lambda starts, tile: (lambda t, g: (t.total(), g, *t.of(g), *t.rows_of(g)))(
            tiles := group_tiles.Tiles(starts, 3, rows, height), tiles.group_of(tile)
        )
    )
    for sizes in SIZES:
        starts = group_tiles.starts_of(np.int32(sizes), height)
        total = int(find(starts, 0)[0])
        assert total <= group_tiles.most_tiles(rows, 3, height)
        seen = np.full(rows, -1)
        for tile in range(total):
            _, group, first, count, start, end = map(int, find(starts, tile))
            assert first <= tile < first + count
            at = start + (tile - first) * height
            assert at < end
            here = slice(at, min(at + height, end))
            assert (seen[here] == -1).all()
            seen[here] = group
        np.testing.assert_array_equal(
            seen, reference.group_of_rows(jnp.array(sizes), rows), err_msg=str(sizes)
        )


def test_sizes_that_are_too_large_do_not_reach_beyond_the_rows():
    """Under jit nobody sees them before a kernel writes."""
    tiles = group_tiles.Tiles(group_tiles.starts_of(jnp.int32([8, 30, 5]), 8), 3, 20, 8)
    ends = [int(tiles.rows_of(jnp.int32(group))[1]) for group in range(4)]
    assert ends == [8, 20, 20, 20]


@pytest.mark.parametrize("spacing", [1, 8])
def test_spaced_groups_start_where_a_kernel_may_read(spacing):
    x = np.arange(20)
    for sizes in SIZES:
        moved = x[group_tiles.spaced(np.int32(sizes), 20, spacing)]
        assert len(moved) == group_tiles.most_spaced(20, 3, spacing)
        source = group_tiles.starts_of(np.int32(sizes), 4, spacing).source
        for first, row, size in zip(source, np.cumsum([0, *sizes]), sizes, strict=False):
            assert first % spacing == 0
            np.testing.assert_array_equal(moved[first : first + size], x[row : row + size])
