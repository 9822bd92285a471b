"""What the number of devices does to a quantized folder: nothing, or a rounding.

Batches spread over 2, 4 or 8 devices with the weights on each of them give the bytes of one device,
on CPUs: moments are sums of eighths of a batch however these lie (`wush_jax.transforms.moments`),
and one device solves. What is left to the compiler is that a text goes through the model alike
whatever the number of texts beside it. XLA's for CPUs sees to that in the cases below; not for very
small texts (32 tokens of width 64), nor for 256 tokens of width 256. Weights that are spread are
another matter: products are summed by parts, so activations differ by rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import ONE_ORDER
from folders import write
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import codes
from weights import random_model

import wush_jax as wush
from wush_jax.calibration.streaming import quantize_folder
from wush_jax.models import LlamaConfig, load_pretrained, tensor_parallel, to_tensors

pytestmark = pytest.mark.usefixtures("float32_matmuls", "eight_devices")

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(256, size=(2, 8, 64), dtype=np.int32)
RTN, GPTQ = (wush.Recipe(solver=solver) for solver in ("rtn", "gptq"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = to_tensors(random_model(CONFIG))
    scale = CONFIG.hidden_size**-0.5
    tensors = {n: t if "norm" in n else t * scale for n, t in tensors.items()}
    folder = tmp_path_factory.mktemp("source")
    return write(folder, CONFIG, {n: t.astype(jnp.bfloat16) for n, t in tensors.items()})


def mesh(count, axis):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), (axis,), (AxisType.Auto,))


def quantize(source, out, recipe, count, dtype):
    """Layer after layer, each batch spread over some devices."""
    rows, everywhere = None, None
    if count > 1:
        rows = NamedSharding(mesh(count, "data"), PartitionSpec("data"))
        everywhere = NamedSharding(rows.mesh, PartitionSpec())
    rules = [("lm_head", None), (".*", recipe)]
    settings = wush.Sequential(sharding=rows)
    quantize_folder(source, out, TOKENS, rules, settings=settings, sharding=everywhere, dtype=dtype)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.skipif(not ONE_ORDER, reason="a GPU's library may sum another number of products anew")
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        pytest.param(RTN, jnp.float32, id="rtn", marks=pytest.mark.slow),  # as test_end_to_end.py
        pytest.param(RTN, jnp.bfloat16, id="rtn-bfloat16", marks=pytest.mark.slow),
        pytest.param(GPTQ, jnp.bfloat16, id="gptq", marks=pytest.mark.slow),
        pytest.param(wush.BEST, jnp.float32, id="best", marks=pytest.mark.slow),
    ],
)
def test_spread_batches_write_the_same_bytes(source, tmp_path, recipe, dtype):
    expected = quantize(source, tmp_path / "one", recipe, 1, dtype)
    found = quantize(source, tmp_path / "spread", recipe, 8, dtype)
    assert found.keys() == expected.keys()
    for name, content in found.items():
        assert content == expected[name], name


@pytest.mark.slow
def test_spread_weights_give_as_good_a_model(source, tmp_path):
    """The first attention is the same; the rest sees sums of eight parts, other in the last bit.

    That bit decides on the signs of transforms (two entries of a row as good as equal), and signs
    on codes: another file, as good, with its predicted gains and losses within a few per cent.
    """
    rules = [("lm_head", None), (".*", RTN)]
    reports = [
        quantize_folder(source, tmp_path / name, TOKENS, rules, sharding=sharding)
        for name, sharding in (("1", None), ("8", tensor_parallel(mesh(8, "model"))))
    ]
    one, spread = (wush.load(tmp_path / name) for name in ("1", "8"))
    first = [codes(model) for model in (one, spread)]
    for path in (p for p in first[0] if p.startswith("layers.0.self_attn.")):
        np.testing.assert_array_equal(first[0][path], first[1][path])
    for found, expected in zip(reports[1].layers, reports[0].layers, strict=True):
        assert found.predicted_gain == pytest.approx(expected.predicted_gain, rel=0.05)
        assert found.relative_loss == pytest.approx(expected.relative_loss, rel=0.2)
    original = load_pretrained(source)
    kl = [wush.kl_divergence(original, model, TOKENS) for model in (one, spread)]
    assert kl[1] == pytest.approx(kl[0], rel=0.25)
