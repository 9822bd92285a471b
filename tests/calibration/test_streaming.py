"""A folder quantized layer by layer: the same files as with the whole model in memory."""

import dataclasses
import gc
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import memory_run
import numpy as np
import pytest
from folders import contents, write
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.calibration import streaming
from wush_jax.calibration.streaming import quantize_folder
from wush_jax.layers.dense import dense_layers
from wush_jax.models import load_pretrained, to_tensors
from wush_jax.models.hugging_face import abstract

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float32_matmuls")]

UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False, attention_bias=True)
BATCHES = tokens(2, shape=(2, 32))
RECIPE = wush.Recipe(transform="wush", solver="rtn")
BODY = [("lm_head", None), (".*", RECIPE)]


class Seen(list):
    """A callback that takes everything down, and what the steps cost."""

    def __call__(self, *now):
        self.append(now)

    def weigh(self, costs):
        self.costs = costs


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = to_tensors(random_model(UNTIED))
    tensors = {name: t.astype(jnp.bfloat16) for name, t in tensors.items()}
    return write(tmp_path_factory.mktemp("source"), UNTIED, tensors, 2)


@pytest.fixture(scope="module")
def streamed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("streamed") / "out"
    seen = Seen()
    report = quantize_folder(source, out, BATCHES, BODY, progress=seen)
    return out, report, seen


def test_files_equal_those_of_the_whole_model(source, streamed, tmp_path):
    model = load_pretrained(source, param_dtype=jnp.bfloat16)
    quantized, report = wush.quantize_model(model, BATCHES, BODY, sequential=wush.Sequential())
    wush.save(tmp_path / "whole", quantized)
    config, tensors = contents(tmp_path / "whole")
    streamed_config, streamed_tensors = contents(streamed[0])
    assert streamed_config == config
    assert streamed_tensors == tensors
    assert streamed[1].layers == report.layers
    assert streamed[1].skipped == report.skipped


def test_hidden_states_that_stay_on_the_device_change_nothing(
    source, streamed, tmp_path, monkeypatch
):
    size = sum(batch.size for batch in BATCHES) * CONFIG.hidden_size * 2  # bfloat16
    monkeypatch.setattr(streaming, "stay_on_device", lambda needed: needed == size)
    report = quantize_folder(source, tmp_path / "out", BATCHES, BODY)
    assert contents(tmp_path / "out") == contents(streamed[0])
    assert report.layers == streamed[1].layers


def test_progress_reaches_its_total(streamed):
    seen = streamed[2]
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total, _ in seen} == {len(seen)}


def test_every_step_has_its_cost(streamed):
    """Two operations a weight and token; the moments on top, and the solver of the pass before."""
    seen = streamed[2]
    assert len(seen.costs) == len(seen)
    layers, _ = dense_layers(abstract(UNTIED).layers[0])
    forward = 2 * sum(layer.kernel.size for layer in layers.values()) * BATCHES[0].size
    went_on = [c for c, (_, _, what) in zip(seen.costs, seen, strict=True) if what == "forward"]
    assert went_on[1] == forward
    assert went_on[0] > forward
    others = [c for c, (_, _, what) in zip(seen.costs, seen, strict=True) if what != "forward"]
    assert min(others) > forward


def test_nothing_is_left_beside_the_result(streamed):
    assert [path.name for path in streamed[0].parent.iterdir()] == ["out"]


def test_the_head_is_quantized_on_what_reaches_it(source, tmp_path):
    report = quantize_folder(source, tmp_path / "out", BATCHES, RECIPE)
    (head,) = [row for row in report.layers if row.path == "lm_head"]
    assert 0 < head.relative_loss < 0.1
    assert type(wush.load(tmp_path / "out").lm_head).__name__ == "QuantizedDense"


def test_a_run_that_died_goes_on(source, streamed, tmp_path):
    class Died(Exception):
        pass

    def die(done, total, what):
        if done > total * 0.7:
            raise Died

    settings = wush.Sequential(state_dir=tmp_path / "state")
    with pytest.raises(Died):
        quantize_folder(source, tmp_path / "out", BATCHES, BODY, settings=settings, progress=die)
    assert not (tmp_path / "out").exists()
    finished = (tmp_path / "state" / "stage-00000.safetensors").stat().st_mtime_ns
    settings = dataclasses.replace(settings, resume=True)
    report = quantize_folder(source, tmp_path / "out", BATCHES, BODY, settings=settings)
    assert contents(tmp_path / "out") == contents(streamed[0])
    assert report.layers == streamed[1].layers
    assert (tmp_path / "state" / "stage-00000.safetensors").stat().st_mtime_ns == finished
    with pytest.raises(ValueError, match=r"another run: batches .* differ"):
        quantize_folder(source, tmp_path / "out", tokens(1, seed=3), BODY, settings=settings)


def test_mistakes_are_named_before_any_work(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="batches is empty"):
        quantize_folder(source, out, [], BODY)
    with pytest.raises(
        ValueError,
        match=r"vocabulary of 64 tokens: 64 at row 0, column 1",
    ):
        quantize_folder(source, out, [np.array([[0, 64]])], BODY)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other files"):
        quantize_folder(source, out, BATCHES, BODY, progress=lambda *now: 1 / 0)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(UNTIED.to_dict()))
    with pytest.raises(ValueError, match="neither"):
        quantize_folder(tmp_path / "bare", tmp_path / "new", BATCHES, BODY)


def test_one_layer_is_in_memory_at_a_time(tmp_path):
    """One layer's weights and moments are on the devices; on the way to the next layer, none."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=4)
    source = write(tmp_path, config, to_tensors(random_model(config)), 2)
    layer = sum(t.nbytes for n, t in to_tensors(random_model(config)).items() if ".layers.0." in n)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    peaks = []

    def look(done, total, what):
        peaks.append((what, sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)))

    quantize_folder(source, tmp_path / "out", BATCHES, BODY, progress=look)
    assert max(size for _, size in peaks) < 1.75 * layer, (peaks, layer)
    assert max(size for what, size in peaks if what == "forward") < 0.75 * layer, (peaks, layer)


@pytest.mark.slow
def test_host_memory_is_that_of_a_layer(tmp_path):
    """Wider layers take, at the peak, 1.5 times what they are larger, and their activations."""
    figures = []
    for width in (256, 1024):
        folder, out = tmp_path / f"{width}", tmp_path / f"{width}-out"
        for arguments in (["make", folder, "3", width], ["trace", folder, out]):
            done = subprocess.run(
                [sys.executable, memory_run.__file__, *map(str, arguments)],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a GPU's memory is this process's
                capture_output=True,
                text=True,
                check=True,
            )
        figures.append(json.loads(done.stdout))
    small, large = figures
    more = {key: large[key] - small[key] for key in ("layer", "hidden", "host")}
    assert more["host"] < 1.5 * more["layer"] + more["hidden"], figures
