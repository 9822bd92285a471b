"""gpt-oss as released, with MXFP4 experts: read as they are, and the same mathematics."""

import json

import numpy as np
import pytest
from flax import nnx
from folders import write
from gpt_oss_folders import OSS, gpt_oss, gpt_oss_tensors
from tiny import tokens

import wush_jax as wush
from wush_jax.models import generate, load_pretrained

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model twice: experts in 4 bits as released, and as floating point numbers."""
    released, plain = gpt_oss_tensors()
    one, two = (tmp_path_factory.mktemp(name) for name in ("released", "plain"))
    return gpt_oss(one, released, 2), write(two, OSS, plain), released


def test_experts_are_read_as_they_are(folders, tmp_path):
    released, plain, tensors = folders
    assert OSS.family == "gpt_oss"
    model, same = wush.load(released), load_pretrained(plain)
    experts = model.layers[0].mlp.experts
    blocks = tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"].reshape(3, 128, 32)
    np.testing.assert_array_equal(experts.gate_proj.codes[...], blocks[:, ::2])
    np.testing.assert_array_equal(experts.up_proj.codes[...], blocks[:, 1::2])
    assert experts.down_proj.input_format is None
    run = nnx.jit(lambda model, batch: model(batch))
    batch = tokens(1)[0]
    want = run(same, batch)
    # float32 sums of 64 terms in another order.
    np.testing.assert_allclose(run(model, batch), want, rtol=1e-4, atol=1e-4 * abs(want).max())
    prompt = batch[:, :4]
    np.testing.assert_array_equal(
        generate(model, prompt, max_new_tokens=3).tokens,
        generate(same, prompt, max_new_tokens=3).tokens,
    )
    wush.save(tmp_path / "ours", model)
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "gpt_oss"
    again = wush.load(tmp_path / "ours")
    np.testing.assert_array_equal(run(again, batch), run(model, batch))


def test_damage_is_named(folders, tmp_path):
    tensors = dict(folders[2])
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    tensors[name] = tensors[name][:, :, :, :8].copy()
    quantization = {"quant_method": "mxfp4"}
    with pytest.raises(ValueError, match="gate_up_proj_blocks"):
        wush.load(write(tmp_path, OSS, tensors, quantization_config=quantization))
