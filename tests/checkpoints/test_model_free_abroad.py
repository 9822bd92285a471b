"""Folders rounded without a model, opened by compressed-tensors and transformers themselves."""

import json
import warnings

import encoded_folders
import jax.numpy as jnp
import numpy as np
import pytest
from encoded_folders import LINEARS
from flax import nnx
from layout_tools import ROUND_175
from mutated_folders import unencoded

import wush_jax as wush
from wush_jax.calibration import round_folder
from wush_jax.checkpoints import interchange
from wush_jax.checkpoints.content import ACTIVATIONS
from wush_jax.formats import NVFP4

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("compressed_tensors")

pytestmark = [pytest.mark.files, pytest.mark.filterwarnings("ignore")]

CASES = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": ROUND_175}


@pytest.mark.parametrize("layout", CASES)
def test_their_weights_are_ours_and_logits_agree(layout, tmp_path):
    # All in bfloat16, to which transformers rounds whatever it loads; attention that is not sharp.
    tensors = {n: (0.2 * t if n[:-7] in LINEARS else t) for n, t in unencoded().items()}
    tensors = {n: t.astype(jnp.bfloat16) for n, t in tensors.items()}
    encoded_folders.write(tmp_path / "source", tensors, None, torch_dtype="bfloat16")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    recipe = wush.Recipe(CASES[layout], None, transform="identity")  # inputs stay as they are
    rules = [("lm_head", None), (".*", recipe)]
    round_folder(tmp_path / "source", tmp_path / "out", rules, layout=layout)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokens = np.arange(12)[None] % 16
    with torch.no_grad():
        theirs(torch.tensor(tokens))  # decompresses its weights, to bfloat16
        torch.nn.Module.float(theirs)  # its own refuses, since it was quantized
        found = theirs(torch.tensor(tokens)).logits.numpy()
    modules = dict(theirs.named_modules())
    layers = interchange.read_layers(tmp_path / "out")
    assert set(layers) == set(LINEARS)
    for name, packed in layers.items():
        weight = modules[name].weight.detach()
        ours = np.asarray(wush.dequantize(packed.weight)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(weight.float().numpy(), ours.astype("f4"), err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config[ACTIVATIONS] = "float32"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model = wush.load(tmp_path / "out")
    wanted = np.asarray(nnx.jit(lambda m, t: m(t))(model, tokens), np.float32)
    # MXFP4 is exact in bfloat16: sums in another order. NVFP4's weights are rounded, by 2^-9.
    bound = 1e-4 if layout.startswith("mx") else 0.02
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < bound
