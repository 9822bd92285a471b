"""Folders of any architecture, rounded without a model: exact, resumable, nothing silent."""

import json
import tracemalloc

import encoded_folders
import jax.numpy as jnp
import numpy as np
import pytest
from folders import contents
from safetensors.numpy import save_file

import wush_jax as wush
from wush_jax import cli
from wush_jax.calibration import round_folder, rounding
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4
from wush_jax.formats.arrays import dequantize

pytestmark = pytest.mark.files

HADAMARD = wush.Recipe(transform="hadamard")
ROUND_175 = wush.MXFP4.replace(rule="round_175", global_scale=1.0)
RULES = [("head", None), (".*", HADAMARD)]
WIDTH = 64
# Of no architecture that there is: shape, dtype, and why it stays; None for what is quantized.
TENSORS = {
    "core.3.attn.q_proj.weight": ((32, 64), "bfloat16", None),
    "core.3.attn.k_proj.weight": ((32, 64), "bfloat16", None),
    "core.3.attn.o_proj.weight": ((64, 32), "float16", None),
    "core.3.moe.experts.gate_up_proj": ((3, 32, 64), "bfloat16", None),
    "core.3.moe.experts.1.w2.weight": ((64, 32), "float32", None),
    "core.3.moe.gate.weight": ((3, 64), "float32", "a router of experts"),
    "core.3.mixer.A_log": ((64, 32), "float32", "no weight of a layer by its name"),
    "core.3.mixer.x_proj.weight": ((40, 40), "bfloat16", "groups of 32 (MXFP4) do not tile K = 40"),
    "core.3.mixer.conv1d.weight": ((64, 1, 4), "bfloat16", "no matrix: 3 axes"),
    "core.3.norm.weight": ((64,), "float32", "no matrix: one axis"),
    "vision.patch.weight": ((64, 3, 8, 8), "float16", "no matrix: 4 axes"),
    "core.tok_embeddings.weight": ((50, 64), "bfloat16", "an embedding"),
    "core.table.weight": ((4, 64), "int64", "its values are int64"),
    "head.weight": ((50, 64), "bfloat16", "a rule leaves it"),
}
CONFIG = {"model_type": "nobody_knows", "hidden_size": WIDTH, "eos_token_id": [7, 8]}
QUANTIZED = [name for name, (*_, why) in TENSORS.items() if why is None]


def values(name):
    shape, dtype, _ = TENSORS[name]
    random = np.random.default_rng(len(name) + sum(map(ord, name)))
    return (3 * random.standard_normal(shape)).astype(jnp.dtype(dtype))


def write(folder, tensors, files=2, **config):
    folder.mkdir()
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    where = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "source"
    write(folder, {name: values(name) for name in TENSORS}, auto_map={"AutoModel": "modeling_x.X"})
    for name in ("tokenizer.json", "generation_config.json", "modeling_x.py", "odd.bin"):
        (folder / name).write_text("{}")
    return folder


def layer(tensor):
    return tensor.removesuffix(".weight")


def same(found, wanted):
    """Codes, scales and global scale, bit for bit."""
    for key in ("codes", "scales", "global_scale"):
        a, b = (np.asarray(getattr(w, key)) for w in (found, wanted))
        assert (a.tobytes(), a.dtype) == (b.tobytes(), b.dtype), key


@pytest.mark.parametrize("rows", [2**24, 64 * 4 * 20])
def test_every_matrix_is_rounded_and_the_rest_is_listed(source, tmp_path, rows, monkeypatch):
    monkeypatch.setattr(rounding, "ROWS_BYTES", rows)  # in one go; the last part of 12 rows
    report = round_folder(source, tmp_path / "out", RULES, shard_bytes=20_000)
    assert sorted(row.path for row in report.layers) == sorted(map(layer, QUANTIZED))
    reasons = {name: why for name, (*_, why) in TENSORS.items() if why is not None}
    assert report.skipped.keys() == reasons.keys()
    assert all(report.skipped[name].startswith(why) for name, why in reasons.items())
    assert report.notes == ("not copied: odd.bin",)
    assert not report.unused_rules
    found = interchange.read_layers(tmp_path / "out")
    for name in QUANTIZED:
        weight, packed = values(name).astype(np.float32), found[layer(name)]
        if weight.ndim == 2:
            same(packed.weight, wush.quantize_weight(weight, None, HADAMARD).weight)
        for one, rows in zip(np.atleast_1d(packed.weight.codes), weight, strict=False):
            if weight.ndim == 3:
                same_codes = wush.quantize_weight(rows, None, HADAMARD).weight.codes
                assert one.tobytes() == np.asarray(same_codes).tobytes()
        row = next(row for row in report.layers if row.path == layer(name))
        assert 0.005 < row.weight_error < 0.02  # MXFP4 of Gaussian values: 0.0126
    config, tensors = contents(tmp_path / "out")
    assert {k: v for k, v in config.items() if k != "quantization_config"} == {
        **CONFIG,
        "auto_map": {"AutoModel": "modeling_x.X"},
    }
    before = contents(source)[1]
    assert {name: tensors[name] for name in reasons} == {name: before[name] for name in reasons}
    for name in ("tokenizer.json", "generation_config.json", "modeling_x.py"):
        assert (tmp_path / "out" / name).read_text() == "{}"
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_layers_that_are_read_as_one_share_a_scale_from_data(source, tmp_path):
    derived = NVFP4.replace(global_scale=None)
    recipe = wush.Recipe(derived, None, transform="identity")
    rules = [(r".*(attn|experts).*", recipe)]
    round_folder(source, tmp_path / "out", rules)
    found = interchange.read_layers(tmp_path / "out")
    q, k, o = (found[f"core.3.attn.{n}_proj"].weight for n in "qko")
    weights = [values(f"core.3.attn.{n}_proj.weight").astype("f4") for n in "qk"]
    wanted = 448 * 6 / np.abs(np.concatenate(weights)).max()
    np.testing.assert_allclose([q.global_scale, k.global_scale], wanted, rtol=1e-6)
    assert o.global_scale != q.global_scale
    stack = found["core.3.moe.experts.gate_up_proj"].weight
    whole = values("core.3.moe.experts.gate_up_proj").astype("f4")
    np.testing.assert_allclose(
        stack.global_scale, 448 * 6 / np.abs(whole).max(axis=(1, 2)), rtol=1e-6
    )
    error = np.asarray(dequantize(stack)) - whole
    assert (error**2).sum() < 0.012 * (whole**2).sum()


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        ("fp_quant", HADAMARD),
        ("nvfp4-pack-quantized", wush.Recipe(NVFP4, transform="hadamard")),
        ("mxfp4-pack-quantized", wush.Recipe(ROUND_175, transform="identity")),
    ],
)
def test_layouts_of_other_libraries(source, tmp_path, layout, recipe):
    rules = [("head", None), (".*", recipe)]
    report = round_folder(source, tmp_path / "out", rules, layout=layout, rotated=True)
    flat = [name for name in QUANTIZED if len(TENSORS[name][0]) == 2]
    found = interchange.read_layers(tmp_path / "out")
    assert sorted(found) == sorted(map(layer, flat))
    for name in flat:
        wanted = wush.quantize_weight(values(name).astype("f4"), None, recipe)
        assert (
            found[layer(name)].weight.codes.tobytes() == np.asarray(wanted.weight.codes).tobytes()
        )
    assert "no room" in report.skipped["core.3.moe.experts.gate_up_proj"]
    config = contents(tmp_path / "out")[0]
    quantization = config.pop("quantization_config")
    ignored = quantization.get("ignore", quantization.get("modules_to_not_convert"))
    plain = ["core.3.moe.gate", "core.3.mixer.x_proj", "core.table", "head", "core.3.moe.experts"]
    assert sorted(ignored) == sorted([*plain, "lm_head"])
    assert (config["eos_token_id"], "dtype" in config) == ([7, 8], False)


class Interrupted(Exception):
    """Ctrl-C in the middle of a run."""


def test_an_interrupted_run_goes_on_to_the_same_bytes(source, tmp_path):
    options = {"shard_bytes": 9000}
    told = []
    round_folder(source, tmp_path / "whole", RULES, progress=lambda *a: told.append(a), **options)
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert told[-1][0] == told[-1][1]
    state = {"state_dir": tmp_path / "state"}
    for calls in range(len(told)):
        left = iter(range(calls))

        def interrupt(*told, left=left):
            if next(left, None) is None:
                raise Interrupted

        with pytest.raises(Interrupted):
            round_folder(
                source, tmp_path / "out", RULES, progress=interrupt, resume=calls > 0, **state
            )
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="resume=True"):
        round_folder(source, tmp_path / "out", RULES, **state)
    with pytest.raises(ValueError, match=r"another run: .*rules"):
        round_folder(source, tmp_path / "out", HADAMARD, resume=True, **state)
    done = sorted(f.name for f in (tmp_path / "state").glob("stage-*"))
    assert len(done) == len(QUANTIZED) - 1
    damaged = tmp_path / "state" / done[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="delete it to redo that stage"):
        round_folder(source, tmp_path / "out", RULES, resume=True, **options, **state)
    damaged.unlink()
    round_folder(source, tmp_path / "out", RULES, resume=True, **options, **state)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == files
    assert not (tmp_path / "state").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "whole"]


def test_the_host_holds_one_matrix(tmp_path):
    """12 tensors of 1 MiB: one of them quantized, some rows as floats, and names."""
    random = np.random.default_rng(0).standard_normal((512, 1024)).astype(jnp.bfloat16)
    names = [f"layers.{i}.proj.weight" for i in range(12)]
    write(tmp_path / "source", dict.fromkeys(names, random), files=1)
    run = {"rules": wush.Recipe(transform="identity"), "shard_bytes": 2**21}
    round_folder(tmp_path / "source", tmp_path / "once", **run)  # what jax and numpy keep
    tracemalloc.start()
    round_folder(tmp_path / "source", tmp_path / "out", **run)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The part as float32 and padded, 4 MiB, its codes and scales twice.
    assert peak < 6 * 2**20, peak


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rules": wush.Recipe()}, r"transform='wush', which needs a calibration; .*'hadamard'"),
        (
            {"rules": [("x", wush.PAPER)], "layout": "zip"},
            r"layout='zip'.*transform='wush'.*solver='gptq'.*there is 'rtn'",
        ),
        ({"rules": [(".*", None)]}, "no matrix that the rules quantize"),
        ({"layout": "nvfp4-pack-quantized"}, "weight formats e2m1, groups of 16"),
        (
            {"layout": "nvfp4-pack-quantized", "rules": wush.Recipe(NVFP4, transform="hadamard")},
            "rotated=True",
        ),
        ({"layout": "fp_quant", "rules": wush.Recipe(wush.INT4, transform="identity")}, "formats"),
    ],
)
def test_what_cannot_be_done_is_told_before_any_work(source, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        round_folder(source, tmp_path / "out", **{"rules": HADAMARD, **options})
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_to_be_rounded(source, tmp_path):
    tensors = {
        "a.c_attn.weight": np.ones((64, 32), "f4"),
        "a.c_proj.weight": np.ones((32, 64), "f4"),
    }
    write(tmp_path / "gpt", tensors)
    with pytest.raises(ValueError, match=r"2 matrices lie the other way .*width 64.*turned="):
        round_folder(tmp_path / "gpt", tmp_path / "out", HADAMARD)
    assert not (tmp_path / "out").exists()
    report = round_folder(tmp_path / "gpt", tmp_path / "out", HADAMARD, turned=[r"a\.c_.*"])
    assert [row.shape for row in report.layers] == [(32, 64), (64, 32)]
    found = interchange.read_layers(tmp_path / "out")["a.c_attn"].weight
    same(found, wush.quantize_weight(np.ones((32, 64), "f4"), None, HADAMARD).weight)
    with pytest.raises(ValueError, match="quantized already"):
        round_folder(tmp_path / "out", tmp_path / "again", HADAMARD)
    as_they_are = round_folder(tmp_path / "gpt", tmp_path / "straight", HADAMARD, turned=[])
    assert [row.shape for row in as_they_are.layers] == [(64, 32), (32, 64)]
    tensors["a.c_attn.weight"] = np.full((32, 64), np.nan, "f4")
    write(tmp_path / "nan", tensors | {"a.c_proj.weight": np.ones((64, 32), "f4")})
    with pytest.raises(ValueError, match=r"'a\.c_attn\.weight' has values that are not finite"):
        round_folder(tmp_path / "nan", tmp_path / "no", HADAMARD)


def test_encoded_weights_are_decoded_one_by_one(tmp_path):
    """GPTQ in, NVFP4 out: as if the folder had held what its codes mean."""
    source, wanted = encoded_folders.gptq(tmp_path / "gptq")
    recipe = wush.Recipe(NVFP4, transform="identity")
    run = {"layout": "nvfp4-pack-quantized", "rules": [("lm_head", None), (".*", recipe)]}
    round_folder(source, tmp_path / "out", **run)
    found = interchange.read_layers(tmp_path / "out")
    assert {f"{name}.weight" for name in found} == set(wanted)
    name = "model.layers.0.mlp.up_proj"
    weight = wanted[f"{name}.weight"].astype(np.float16)
    same(found[name].weight, wush.quantize_weight(weight.astype("f4"), None, recipe).weight)
    config = contents(tmp_path / "out")[0]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (config["torch_dtype"], config["rms_norm_eps"]) == ("float16", 1e-5)


def test_from_the_command(source, tmp_path, capsys):
    command = ["quantize", str(source), "--out", str(tmp_path / "out"), "--model-free"]
    assert cli.main([*command, "--text", "x", "--calibration", "one-shot"]) == 2
    assert "leave out --text, --calibration one-shot" in capsys.readouterr().err
    assert cli.main([*command, "--preset", "best"]) == 2
    assert "--preset best needs a calibration" in capsys.readouterr().err
    assert cli.main([*command, "--skip", "head", "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert cli.main([*command, "--skip", "head"]) == 0
    out = capsys.readouterr().out
    assert "left alone: core.3.moe.gate.weight: a router" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["transform"] for row in report["layers"]} == {"hadamard"}
    round_folder(source, tmp_path / "python", RULES)
    assert contents(tmp_path / "out" / "checkpoint") == contents(tmp_path / "python")
    command[3] = str(tmp_path / "nv")
    assert cli.main([*command, "--for", "nvfp4-pack-quantized"]) == 0
    layers = interchange.inspect_folder(tmp_path / "nv" / "checkpoint").layers
    assert {layer.transform for layer in layers} == {"identity"}
    assert "saturate" in capsys.readouterr().out
