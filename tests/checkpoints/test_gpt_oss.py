"""gpt-oss as released, with MXFP4 experts: read as they are, and the same mathematics."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from folders import write
from tiny import CONFIG, tokens
from weights import random_model

import wush_jax as wush
from wush_jax.models import generate, load_pretrained, to_tensors

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]

OSS = dataclasses.replace(
    CONFIG,
    **{"num_hidden_layers": 1, "num_experts": 3, "norm_topk_prob": True, "mlp_bias": True},
    **{"attention_sinks": True, "swiglu_limit": 1.5, "tie_word_embeddings": False},
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model twice: experts in 4 bits as released, and as floating point numbers."""
    rng = np.random.default_rng(0)
    released, plain = {}, {}
    for name, value in to_tensors(random_model(OSS)).items():
        if ".experts." not in name:
            released[name] = plain[name] = value
    experts = "model.layers.0.mlp.experts"
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        codes = rng.integers(16, size=(3, rows, 64), dtype=np.uint8)
        scales = rng.integers(122, 126, size=(3, rows, 2), dtype=np.uint8)
        released[f"{experts}.{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).reshape(
            3, rows, 2, 16
        )
        released[f"{experts}.{name}_scales"] = scales
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        values *= np.repeat(2.0 ** (scales - 127.0), 32, axis=-1)
        plain[f"{experts}.{name}"] = np.ascontiguousarray(values.mT, np.float32)
        bias = rng.standard_normal((3, rows)).astype(np.float32)
        released[f"{experts}.{name}_bias"] = plain[f"{experts}.{name}_bias"] = bias
    one, two = (tmp_path_factory.mktemp(name) for name in ("released", "plain"))
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return (
        write(one, OSS, released, 2, quantization_config=quantization),
        write(two, OSS, plain),
        released,
    )


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
