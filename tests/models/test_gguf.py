"""GGUF files that the ``gguf`` package wrote: weights, configs, what is refused, transformers."""

import warnings

import numpy as np
import pytest
from flax import nnx

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.models.encodings import gguf_file, open_config, open_folder
from wush_jax.models.encodings.gguf_config import rope_scaling
from wush_jax.models.hugging_face import FolderTensors, load_pretrained
from wush_jax.models.text import Tokenizer
from wush_jax.storage import copy_companions

gguf = pytest.importorskip("gguf")

from gguf_files import their_name, weights, write  # noqa: E402 (needs the package)

pytestmark = pytest.mark.files

ROUTER = "model.layers.0.mlp.router.weight"


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_weights_and_config(architecture, tmp_path):
    wanted = write(tmp_path / "m.gguf", architecture)
    tensors = FolderTensors(tmp_path / "m.gguf")
    assert set(tensors) == set(wanted)
    opened = open_folder(tmp_path)  # the only file of its folder
    for name, value in wanted.items():
        found = opened.read(name, [np.float32], [value.shape])
        np.testing.assert_array_equal(found, value, err_msg=name)
    config = tensors.config
    assert (config.family, config.vocab_size, config.head_dim) == (architecture, 16, 32)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (np.float32(1e-5), False)
    assert open_config(tmp_path / "m.gguf")["eos_token_id"] == 2
    kinds = {layer.name: layer.format for layer in interchange.inspect_folder(tmp_path).layers}
    assert kinds["model.layers.0.mlp.up_proj"] == "Q4_1 (decoded)"


def test_our_names_are_those_of_the_package():
    for name in weights("qwen3"):
        assert gguf_file.their_name(their_name(name)) == name


def test_companions_are_those_beside_the_file(tmp_path):
    write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.read(tmp_path / "m.gguf")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["generation_config.json"]


@pytest.mark.usefixtures("float32_matmuls")
def test_transformers_reads_the_same_model(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        write(tmp_path / "m.gguf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="m.gguf", dtype="float32"
        )
    tokens = np.arange(12)[None]
    wanted = theirs(torch.tensor(tokens)).logits.detach().numpy()
    ours = nnx.jit(lambda model, tokens: model(tokens))(load_pretrained(tmp_path), tokens)
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_loaded_model_is_of_plain_layers(tmp_path):
    write(tmp_path / "m.gguf")
    with pytest.warns(UserWarning, match=r"weights decoded, .* 1 of \(Q4_0\)"):
        model = wush.load(tmp_path / "m.gguf")
    assert not [m for _, m in nnx.iter_modules(model) if type(m).__name__ == "QuantizedDense"]
    assert (model.dtype, model.norm.scale.dtype) == ("bfloat16", "float32")  # as the file has them


def test_llama_3_has_its_stretched_frequencies(tmp_path):
    """Factors as the converter writes them; others are refused."""
    config = {"head_dim": 64, "rope_theta": 500000.0}
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, 64, 2) / 64)
    smooth = (8192 / wave - 1) / 3
    factors = np.where(
        wave < 8192 / 4, 1, np.where(wave > 8192, 32, 1 / ((1 - smooth) / 32 + smooth))
    )
    found = rope_scaling(factors.astype("f4"), config)
    assert (found["rope_type"], found["factor"]) == ("llama3", 32.0)
    assert rope_scaling(np.ones(32, "f4"), config) is None
    with pytest.raises(NotImplementedError, match="rope_freqs"):
        rope_scaling(factors.astype("f4") * 1.01, config)
    write(tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.full(16, 3, "f4")})
    with pytest.raises(NotImplementedError, match=r"m\.gguf: rope_freqs\.weight"):
        wush.load(tmp_path / "m.gguf")


def test_what_is_not_read_is_named(tmp_path):
    file = tmp_path / "m.gguf"
    for options, message in (
        ({"architecture": "bert"}, "general.architecture = 'bert'"),
        ({"expert_count": 8}, "expert_count = 8"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn'"),
        ({"attention.sliding_window": 32}, "attention.sliding_window = 32"),
        ({"rope.dimension_count": 16, "attention.key_length": 32}, "rope.dimension_count = 16"),
        ({"drop": ("block_count", "context_length")}, "block_count is missing"),
        (
            {"tensors": {"model.layers.0.mlp.router.weight": np.ones((2, 64), "f4")}},
            "have no place",
        ),
    ):
        write(file, **options)
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            wush.load(file)
        assert message in str(caught.value)
        assert str(file) in str(caught.value)
    write(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ValueError, match="a part of a file"):
        wush.load(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        wush.load(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    """Cut anywhere, or a bit turned in the header: a message with the file's name, or the model."""
    write(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    random, work, told = np.random.default_rng(0), tmp_path / "w.gguf", []
    for trial in range(60):
        if trial % 2:
            changed = data[: random.integers(len(data))]
        else:
            place, changed = random.integers(1500), bytearray(data)
            changed[place] ^= 1 << random.integers(8)
        work.write_bytes(bytes(changed))
        try:
            open_folder(work)
        except (ValueError, NotImplementedError) as error:
            told.append(str(error))
    assert len(told) > 30
    assert all("w.gguf" in message for message in told)
