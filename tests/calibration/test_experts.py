"""Mixtures of experts through the whole chain: moments, quantization, files, text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folders import write
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.calibration.observe import collect_moments, find_sites
from wush_jax.calibration.streaming import quantize_folder
from wush_jax.models import generate, load_pretrained, to_tensors
from wush_jax.models.stored_names import stored_experts
from wush_jax.solvers.batched import few_tokens, filled
from wush_jax.transforms.grouped import PANEL, GroupedRows, update_groups

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

MIXTRAL = dataclasses.replace(
    CONFIG, num_hidden_layers=1, num_experts=4, norm_topk_prob=True, moe_intermediate_size=32
)
GATE = "layers.0.mlp.experts.gate_proj"
BATCHES = tokens(2)


def empty(groups, size, block, rows):
    one = wush.Moments.init(size, block, rows)
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * groups), one)


@pytest.mark.parametrize("block", [None, 4])
def test_every_group_has_the_moment_of_its_own_rows(block):
    """Groups of more than a panel, of one row and of none; rows beyond the last belong to none."""
    rng = np.random.default_rng(0)
    sizes = np.int32([PANEL + 3, 0, 1])
    x = rng.standard_normal((sizes.sum() + 2, 8)).astype(np.float32)
    moments = empty(3, 8, block, 5)
    for part in (x, 2 * x):
        moments = jax.jit(update_groups)(moments, GroupedRows(part, sizes))
    assert moments.count.tolist() == (2 * sizes).tolist()
    for group, rows in enumerate(np.split(np.float64(x), np.cumsum(sizes))[:3]):
        want = 2.5 * rows.T @ rows / max(len(rows), 1)  # the mean of 1 and 4
        got = np.float64(moments.mean[group])
        if block is not None:
            want = np.stack([want[i : i + 4, i : i + 4] for i in (0, 4)])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        kept = {tuple(row) for row in np.asarray(moments.sample.rows[group]) if row.any()}
        mine = {tuple(row) for scale in (1, 2) for row in scale * np.float32(rows)}
        assert kept <= mine
        assert len(kept) == min(5, len(mine))
        assert moments.largest[group] == pytest.approx(2 * np.abs(rows).max(initial=0))


def test_experts_are_calibrated_on_the_tokens_that_reach_them():
    model = random_model(MIXTRAL)
    sites = {site.name: site for site in find_sites(model, BATCHES[0])}
    assert sites[GATE].layers == (GATE, GATE.replace("gate", "up"))
    site = sites[GATE]
    got = collect_moments(model, BATCHES, {site: 32})[site]
    layer = model.layers[0]
    want, counts = np.zeros((4, 64, 64)), np.zeros(4, int)
    for batch in BATCHES:
        hidden = model.embed(batch)
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden))
        x = layer.post_attention_layernorm(hidden).reshape(-1, 64)
        chosen, _ = layer.mlp.router(x)
        for row, experts in zip(np.float64(x), np.asarray(chosen), strict=True):
            for expert in experts:
                want[expert] += np.outer(row, row)
                counts[expert] += 1
    assert got.count.tolist() == counts.tolist()
    for block in range(2):
        at = slice(32 * block, 32 * block + 32)
        expected = want[:, at, at] / np.maximum(counts, 1)[:, None, None]
        np.testing.assert_allclose(got.mean[:, block], expected, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_take_the_mean_moment_and_are_named():
    model = random_model(MIXTRAL)
    router = model.layers[0].mlp.router
    # Nobody is sent to the last expert.
    router.bias = nnx.Param(jnp.float32([0, 0, 0, -1e9]))
    router.config = dataclasses.replace(MIXTRAL, mlp_bias=True)
    recipe = wush.Recipe(format=wush.NVFP4, block_size=32)
    quantized, report = wush.quantize_model(model, BATCHES, [(".*gate_proj", recipe)])
    (row,) = report.layers
    assert (row.path, row.few_tokens) == (GATE, {"3": 0})
    assert "expert 3 (0)" in report.table().caption
    assert np.isfinite(row.loss)
    for leaf in jax.tree.leaves(nnx.state(quantized)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_too_few_tokens():
    moments = empty(3, 4, 2, 0)
    sizes = np.int32([5, 1, 0])
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    moments = update_groups(moments, GroupedRows(x, sizes))
    assert few_tokens(moments, (3,), 2) == {(1,): 1, (2,): 0}
    mended = filled(moments, (3,), 2)
    np.testing.assert_array_equal(mended.mean[1:], np.asarray(moments.mean)[[0, 0]])
    np.testing.assert_array_equal(mended.mean[0], moments.mean[0])
    # Where all saw too few, only those that saw none are given something.
    mended = filled(moments, (3,), 8)
    np.testing.assert_array_equal(mended.mean[:2], moments.mean[:2])
    np.testing.assert_allclose(mended.mean[2], moments.mean[:2].mean(axis=0), rtol=1e-6)


def test_quantized_experts_are_saved_and_loaded(tmp_path):
    model = random_model(MIXTRAL)
    quantized, report = wush.quantize_model(model, BATCHES, wush.Recipe())
    paths = {row.path for row in report.layers}
    experts = {f"layers.0.mlp.experts.{name}_proj" for name in ("gate", "up", "down")}
    assert experts <= paths
    assert any("Router" in reason for reason in report.skipped.values())
    assert all(0 < row.relative_loss < 0.1 for row in report.layers)
    # Gate and up of a site share one transform, so that their input is quantized once.
    layer = quantized.layers[0].mlp.experts
    assert layer.gate_proj.transform is layer.up_proj.transform
    wush.save(tmp_path / "checkpoint", quantized)
    loaded = wush.load(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint/config.json").read_text())["model_type"] == "mixtral"
    run = nnx.jit(lambda model, batch: model(batch))
    np.testing.assert_array_equal(run(loaded, BATCHES[0]), run(quantized, BATCHES[0]))
    out = generate(loaded, BATCHES[0][:1, :5], max_new_tokens=3)
    whole = np.concatenate([BATCHES[0][:1, :5], out.tokens[:, :2]], axis=1)
    assert int(jnp.argmax(run(loaded, whole)[0, -1])) == out.tokens[0, 2]


def hugging_face(config, tensors):
    """The decoder's tensors under the names that the family's files have."""
    where, found = stored_experts(config), {}
    for name, value in tensors.items():
        names = where[name].names if name in where else (name,)
        parts = value if len(names) > 1 else [value]
        found |= {n: np.ascontiguousarray(part) for n, part in zip(names, parts, strict=True)}
    return found


def test_a_folder_of_experts_is_quantized_layer_by_layer(tmp_path):
    """Qwen 3 MoE's names: files hold every expert by itself, here in three shards."""
    config = dataclasses.replace(MIXTRAL, qk_norm=True, norm_topk_prob=False)
    assert config.family == "qwen3_moe"
    tensors = to_tensors(random_model(config))
    source = tmp_path / "source"
    source.mkdir()
    write(source, config, hugging_face(config, tensors), 3)
    for name, value in to_tensors(load_pretrained(source)).items():
        np.testing.assert_array_equal(value, tensors[name])
    rules = [(".*(gate|up|down)_proj", wush.Recipe(transform="hadamard"))]
    report = quantize_folder(source, tmp_path / "out", BATCHES, rules)
    assert [row.shape for row in report.layers] == [(4, 32, 64), (4, 32, 64), (4, 64, 32)]
    loaded = wush.load(tmp_path / "out")
    whole, _ = wush.quantize_model(load_pretrained(source), BATCHES, rules)
    for one, two in zip(*map(packed_leaves, (loaded, whole)), strict=True):
        np.testing.assert_array_equal(one, two)


def packed_leaves(model):
    experts = model.layers[0].mlp.experts
    return [experts.gate_proj.codes[...], experts.down_proj.codes[...]]
