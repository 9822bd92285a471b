import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from wush_jax import demo
from wush_jax.models import Llama, LlamaConfig, load_pretrained, to_tensors

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
)


@pytest.fixture
def tiny_library(tmp_path):
    files = {f"{name}.py": name for name in demo.CALIBRATION_MODULES + demo.EVALUATION_MODULES}
    files |= {
        "zebra.py": "last",
        "asyncio/subprocess.py": "another module of that name",
        "test/test_argparse.py": "held out",
        "site-packages/other.py": "not the library",
        "_sysconfigdata_here.py": "built",
        "notes.txt": "no source",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    return tmp_path


def test_splits_are_disjoint(tiny_library):
    text = {s: demo.stdlib_text(s, root=tiny_library) for s in ("train", "calibration")}
    assert text["train"] == b"another module of that name\n\nlast"
    assert text["calibration"] == b"argparse\n\nshutil\n\nsmtplib\n\nstatistics\n\ntarfile"


def test_held_out_text_of_this_python():
    assert not set(demo.CALIBRATION_MODULES) & set(demo.EVALUATION_MODULES)
    calibration, evaluation = map(demo.stdlib_text, ("calibration", "evaluation"))
    assert min(len(calibration), len(evaluation)) > 250_000
    assert b"class SequenceMatcher" in evaluation
    assert b"class SequenceMatcher" not in calibration


def test_stdlib_text_names_what_is_missing(tiny_library):
    (tiny_library / "difflib.py").unlink()
    with pytest.raises(ValueError, match=r"lacks difflib\.py"):
        demo.stdlib_text("evaluation", root=tiny_library)
    with pytest.raises(ValueError, match=r"any \.py file"):
        demo.stdlib_text("train", root=tiny_library / "test" / "nowhere")
    with pytest.raises(ValueError, match="split = 'test'"):
        demo.stdlib_text("test")


def test_windows_in_order_cover_the_text_once():
    data = bytes(range(100))
    batches = list(demo.token_batches(data, batch=3, length=8))
    assert len(batches) == 4
    assert {(b.shape, b.dtype.name) for b in batches} == {((3, 8), "int32")}
    assert np.concatenate(batches).ravel().tolist() == list(range(96))
    assert len(list(demo.token_batches(data, batch=3, length=8, limit=2))) == 2


def test_random_windows_are_reproducible_pieces_of_the_text():
    data = bytes(range(100))
    first, again, other = (
        np.concatenate(list(demo.token_batches(data, batch=3, length=8, limit=2, seed=s)))
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (np.diff(first, axis=1) == 1).all()


def test_token_batches_refuses_at_once():
    with pytest.raises(ValueError, match="data has 5 bytes"):
        demo.token_batches(b"abcde", batch=2, length=3)
    with pytest.raises(ValueError, match="batch = 0"):
        demo.token_batches(b"abcde", batch=0, length=3)


def test_saved_model_comes_back(tmp_path):
    path = tmp_path / "model.safetensors"
    model = nnx.jit(lambda: Llama(TINY, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))()
    demo.save_model(path, model)
    loaded = demo.load_model(path)
    assert loaded.config == TINY
    for name, tensor in to_tensors(model).items():
        np.testing.assert_array_equal(to_tensors(loaded)[name], tensor.astype(np.float32))
    with safe_open(path, framework="flax") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").shape == (32, 16)


def test_folder_of_hugging_face_is_read(tmp_path):
    model = nnx.jit(lambda: Llama(TINY, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))()
    demo.save_model(tmp_path / "model.safetensors", model)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    expected = to_tensors(model)
    found = to_tensors(load_pretrained(tmp_path))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.astype(np.float32))
