import functools
import json

import pytest
from checkpoint_tools import Pair, change_config, llama, model_arrays, pair, refuse
from flax import nnx

import wush_jax as wush
from wush_jax.checkpoints.quantization_config import format_to_json

pytestmark = pytest.mark.files


@pytest.fixture
def folder(tmp_path):
    wush.save(tmp_path / "model", pair())
    return tmp_path / "model"


def record(**changes):
    return lambda c: c["layers"]["up"].update(changes)


def fmt(**changes):
    return lambda c: c["formats"]["MXFP4"].update(changes)


MISLABELS = {
    "method": (lambda c: c.update(quant_method="fp_quant"), "forward_dtype=None"),
    "layout": (lambda c: c.update(layout=2), "later version"),
    "naming": (lambda c: c.update(naming="hugging_face"), "names are of kind"),
    "no layers": (lambda c: c.pop("layers"), "entry 'layers' is missing"),
    "layers": (lambda c: c.update(layers=[1]), r"'layers' is \[1\], expected dict"),
    "layer": (lambda c: c["layers"].update(up=3), "layer 'up'.*expected dict"),
    "stranger": (lambda c: c["layers"].update(down=c["layers"]["up"]), "no dense layer called"),
    "shape": (record(shape=[64, 64]), r"\(64, 64\), in the model \(32, 64\)"),
    "no shape": (record(shape=[32, -64]), r"shape=\[32, -64\], expected"),
    "groups": (record(shape=[32, 63]), "groups of 32 .* do not tile"),
    "size of groups": (fmt(group_size=15), "group_size of MXFP4"),
    "block": (record(block=48), "block=48 does not divide K=64"),
    "block of one layer of a site": (record(block=64), "with block=64"),
    "block zero": (record(block=0), "block=0"),
    "smaller block": (record(block=16), "not the first of a site"),
    "no block": (record(block=None), "expected both or neither"),
    "site": (record(site="down"), "not the first of a site"),
    "unknown site": (record(site="../up"), "not the first of a site"),
    "format": (record(format="FP3"), "format 'FP3' is not among"),
    "scale": (record(global_scale=5.0), "the config says 0.2"),
    "scale list": (record(global_scale=["x"]), "positive finite"),
    "scale negative": (record(global_scale=-3.0), "positive finite"),
    "input scale": (record(input_global_scale=1e39), "positive finite"),
    "element": (fmt(element="os.system"), "element='os.system' is unknown"),
    "bits": (fmt(element={"name": "i", "bits": 10**9, "midrise": True}), "bits=1000000000"),
    "rule": (fmt(rule="__import__"), "rule='__import__' is unknown"),
    "group": (fmt(group_size=True), "'group_size' is True, expected int"),
    "zero group": (fmt(group_size=0), "group_size=0"),
    "fmt scale": (fmt(scale_dtype=None), "'scale_dtype' is None, expected str"),
}


@pytest.mark.parametrize("mislabel", MISLABELS)
def test_mislabelled_configs_are_refused(mislabel, folder):
    change, match = MISLABELS[mislabel]
    change_config(change)(folder)
    refuse(folder, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_hidden_layers": 10**9}, "more layers than"),
        ({"hidden_size": "64"}, "describes no Llama"),
        ({"hidden_size": -64}, "describes no Llama"),
        ({"vocab_size": None}, "describes no Llama"),
        ({"vocab_size": 10**30}, "describes no Llama"),
        ({"intermediate_size": 32}, r"\(64, 96\), in the model \(64, 32\)"),
        ({"tie_word_embeddings": True}, "surplus tensors 'lm_head.weight'"),
        ({"num_attention_heads": 0}, "describes no Llama|in the model"),
        ({"rope_theta": []}, "describes no Llama"),
    ],
)
def test_nonsensical_model_configs_are_refused(change, match, tmp_path):
    folder = tmp_path / "model"
    wush.save(folder, llama("identity"))
    config = json.loads((folder / "config.json").read_text()) | change
    for digest in ("digest", "model_digest"):  # what is behind them
        config["quantization_config"].pop(digest)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        wush.load(folder)


def test_config_beyond_the_decoder(tmp_path):
    wush.save(tmp_path / "model", llama("identity"))
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace('"model_type": "qwen2"', '"model_type": "mamba"'))
    with pytest.raises(NotImplementedError, match="mamba"):
        wush.load(tmp_path / "model")


def leaves(value, path=()):
    """The paths of all entries of a config that are no containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list) and item:
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key)


OTHERS = {
    bool: lambda old: not old,
    int: lambda old: old + 1,
    float: lambda old: old * 2,
    str: lambda old: {"FP8": "MXFP4", "NVINT4": "FP8", "e4m3": "e5m2"}.get(old, old[:-1]),
    dict: lambda old: {"more": 1},
    type(None): lambda old: 7.0,
}
MIXED = {
    "mxfp4 a8": (wush.MXFP4, wush.FP8),
    "nvint4 a4": (wush.NVINT4, "tuned"),
    "nvfp4 a16": (wush.NVFP4, None),
}


@pytest.mark.parametrize("formats", MIXED.values(), ids=MIXED)
def test_a_folder_with_one_entry_changed_is_refused(formats, tmp_path):
    """Or computes the same, where the entry decides nothing. Each entry in turn, each once gone."""
    model, folder = pair(*formats, block_size=32), tmp_path / "model"
    wush.save(folder, model)
    assert model_arrays(wush.load(folder, Pair(nnx.Rngs(0)))) == model_arrays(model)
    file = folder / "config.json"
    text = file.read_text()
    paths = list(leaves(json.loads(text)["quantization_config"]))
    assert len(paths) > 25
    for path in paths:
        for gone in (False, True):
            config = json.loads(text)
            *parents, last = path
            entry = functools.reduce(lambda c, key: c[key], parents, config["quantization_config"])
            old = entry.pop(last)
            if not gone:
                other = OTHERS[type(old)](old)
                entry.insert(last, other) if isinstance(entry, list) else entry.update(
                    {last: other}
                )
            file.write_text(json.dumps(config))
            if (path, gone) == (("digest",), True):
                assert model_arrays(wush.load(folder, Pair(nnx.Rngs(0)))) == model_arrays(model)
                continue
            with pytest.raises(ValueError, match="folder"):
                wush.load(folder, Pair(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("weight", "found", "other"),
    [
        (wush.MXFP4, wush.FP8, wush.MXFP4),  # A4 for A8
        (wush.MXFP4, wush.MXFP4, wush.FP8),
        (wush.NVINT4, wush.FP8, None),  # A16 for A8
        (wush.NVINT4, None, wush.FP8),
        (wush.NVFP4, wush.FP8, wush.MXFP8),  # A8 of other groups
        (wush.MXFP4, wush.MXFP4, wush.MXFP4.replace(global_scale=3.5)),
    ],
    ids=lambda fmt: getattr(fmt, "name", "none"),
)
def test_no_reader_without_the_digest_takes_other_activations(weight, found, other, tmp_path):
    """The small tensors say by themselves how inputs are rounded, where a rule is one number."""
    folder = tmp_path / "model"
    wush.save(folder, pair(weight, found, block_size=32))

    def exchange(config):
        stored = None if other is None else format_to_json(other)
        config["formats"]["X"] = stored or config["formats"].popitem()[1]
        for layer in config["layers"].values():
            layer["input_format"] = None if other is None else "X"

    change_config(exchange)(folder)
    refuse(folder, "config says|surplus|missing|not among|tensors")
