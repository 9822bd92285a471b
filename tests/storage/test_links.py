"""Links in a model's folder: those of Hugging Face's cache and to other models, and no others."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from folders import write
from tiny import BYTES
from weights import random_model

from wush_jax import cli
from wush_jax.models import to_tensors
from wush_jax.storage import TensorFolder, copy_companions, read_config

pytestmark = pytest.mark.files
CONFIG = dataclasses.replace(BYTES, max_position_embeddings=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write(folder, CONFIG, to_tensors(random_model(CONFIG)), files=2)
    (folder / "LICENSE").write_text("MIT")
    np.save(folder.parent / "tokens.npy", np.arange(64))
    return folder


def cached(model, root):
    """The same files as Hugging Face's cache keeps them: named by hash, and links to those."""
    snapshot = root / "models--x--y" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (root / "models--x--y" / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, root / "models--x--y" / "blobs" / f"{number:040x}")
        os.symlink(f"../../blobs/{number:040x}", snapshot / file.name)
    return snapshot


def linked(model, root):
    """A folder of links to the files of another model."""
    for file in model.iterdir():
        os.symlink(file, root / file.name)
    return root


@pytest.mark.parametrize("layout", [cached, linked])
def test_every_command_reads_a_folder_of_links(layout, model, tmp_path, capsys):
    (tmp_path / "links").mkdir()
    folder = str(layout(model, tmp_path / "links"))
    tokens = ["--tokens", str(model.parent / "tokens.npy"), "--length", "8", "--samples", "2"]
    out = str(tmp_path / "out")
    said = []
    for source in (str(model), folder):
        assert cli.main(["evaluate", source, *tokens, "--dtype", "float32"]) == 0
        assert cli.main(["generate", source, "--prompt", "a", "--max-new-tokens", "2"]) == 0
        words = capsys.readouterr().out.replace(source, "").split()
        said.append([word for word in words if not set(word) <= set("─┌┐└┘│┬┴")])
    assert said[0] == said[1]
    recipe = ["--transform", "identity", "--skip", ".*(up|down|gate|k|v|o)_proj"]
    assert cli.main(["quantize", folder, "--out", out, *tokens, *recipe]) == 0
    assert not any(file.is_symlink() for file in (tmp_path / "out" / "checkpoint").iterdir())
    assert (tmp_path / "out" / "checkpoint" / "LICENSE").read_text() == "MIT"
    assert cli.main(["inspect", folder]) in (0, 2)  # no quantized model


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "../private/LICENSE"])
def test_links_to_what_is_no_model_are_refused(target, model, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, folder)
    out.mkdir()
    (tmp_path / "secret").write_text("key")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "LICENSE").write_text("key")
    (tmp_path / "private" / "config.json").write_text('{"auths": 1}')
    for name in ("LICENSE", "config.json"):
        (folder / name).unlink()
        os.symlink(target, folder / name)
    with pytest.raises(ValueError, match=r"LICENSE is a link to .*, outside of its folder"):
        copy_companions(folder, out)
    assert not any(out.iterdir())
    with pytest.raises(ValueError, match=r"config\.json is a link to .*, outside of its folder"):
        read_config(folder)


def test_links_within_a_folder_are_followed(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / ".objects").mkdir()
    for number, file in enumerate(sorted(folder.glob("model-*"))):
        file.rename(folder / ".objects" / str(number))
        os.symlink(f".objects/{number}", file)
    assert set(TensorFolder(folder).entries) == set(TensorFolder(model).entries)
