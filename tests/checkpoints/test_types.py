"""Every tensor that is not quantized keeps the type of its file: native, exported, loaded."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_tools import llama
from flax import nnx
from folders import contents, write
from tiny import BYTES
from weights import random_model

import wush_jax as wush
from wush_jax import cli
from wush_jax.checkpoints import interchange
from wush_jax.models import load_pretrained, to_tensors

pytestmark = pytest.mark.files
CONFIG = dataclasses.replace(BYTES, vocab_size=64, tie_word_embeddings=False)
KINDS = {"embed_tokens": "bfloat16", "norm": "float32", "lm_head": "float16", "proj": "bfloat16"}


def test_quantize_keeps_each_tensors_type(tmp_path):
    tensors = {
        name: value.astype(jnp.dtype(next(k for part, k in KINDS.items() if part in name)))
        for name, value in to_tensors(random_model(CONFIG)).items()
    }
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", CONFIG, tensors)
    np.save(tmp_path / "x.npy", np.arange(32))
    flags = ["--tokens", str(tmp_path / "x.npy"), "--length", "16", "--transform", "identity"]
    flags += ["--activation-format", "none", "--skip", ".*(up|down|gate|k|v|o)_proj", "lm_head"]
    for way in ("sequential", "one-shot"):
        out = tmp_path / way
        argv = ["quantize", str(tmp_path / "source"), "--out", str(out), "--calibration", way]
        assert cli.main([*argv, *flags]) == 0
        found = contents(out / "checkpoint")[1]
        for name, value in tensors.items():
            if "q_proj" not in name:
                assert found[name] == (str(value.dtype), value.shape, value.tobytes())
        loaded = wush.load(out / "checkpoint")
        assert (loaded.norm.scale.dtype, loaded.lm_head.kernel.dtype) == (np.float32, np.float16)
    model = load_pretrained(tmp_path / "source", param_dtype=None)
    assert (model.norm.scale.dtype, model.lm_head.kernel.dtype) == (np.float32, np.float16)


def test_exports_keep_each_tensors_type(tmp_path):
    model = nnx.clone(llama("identity"))  # in bfloat16
    model.norm.scale = nnx.Param(model.norm.scale[...].astype(jnp.float32))
    for layout in ("wush", "fp_quant"):
        interchange.export(tmp_path / layout, model, layout)
        found = contents(tmp_path / layout)[1]
        assert found["model.embed_tokens.weight"][0] == "bfloat16"
        assert found["model.norm.weight"][0] == "float32"
        assert wush.load(tmp_path / layout).norm.scale.dtype == np.float32
