"""Logits that transformers computes from encoded folders, and ours."""

import warnings

import numpy as np
import pytest
from encoded_folders import float_quantized, fp8
from flax import nnx

import wush_jax as wush

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")

from their_folders import compressed_tensors  # noqa: E402  # needs torch

pytestmark = [pytest.mark.files, pytest.mark.filterwarnings("ignore")]

TOKENS = np.arange(12)[None] % 16


FOLDERS = {
    "int4 groups": (compressed_tensors, {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "fp8 blocks": (fp8, {}),
    "fp8 blocks of 16": (fp8, {"block": (16, 32)}),
    "float-quantized tensor": (float_quantized, {"strategy": "tensor"}),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_transformers_computes_the_same(case, tmp_path):
    """Logits of the same files. It cannot load packed zero points, its own included (5.24)."""
    writer, options = FOLDERS[case]
    writer(tmp_path / "model", **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    wanted = theirs(torch.tensor(TOKENS)).logits.detach().numpy()
    ours = wush.load(tmp_path / "model")
    found = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(ours, TOKENS), np.float32)
    # The first is in bfloat16 here: ten roundings of activations, of 2^-8 each.
    bound = 2e-2 if case == "int4 groups" else 1e-4
    assert np.abs(found - wanted).max() < bound * np.abs(wanted).max()
