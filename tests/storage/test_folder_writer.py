"""Saving under faults: a second writer, a writer that was killed, a disk that is full."""

import errno
import multiprocessing.pool
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_tools import Pair, model_arrays, pair
from flax import nnx

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.storage import folder_writer
from wush_jax.storage.folder_lock import sole_writer
from wush_jax.storage.folder_writer import write_folder
from wush_jax.storage.tensor_folder import TensorFolder

pytestmark = pytest.mark.files

CONFIG = {"quantization_config": {"quant_method": "wush"}}


def listing(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "model", {"x": np.arange(4)}, CONFIG)
    return tmp_path / "model"


def value(folder):
    return TensorFolder(folder).read("x", [np.int64], [(4,)]).tolist()


class Slow:
    """A tensor that calls somebody while it is written."""

    shape, dtype, nbytes = (4,), np.dtype(np.int64), 32

    def __init__(self, call):
        self.call = call

    def __getitem__(self, rows):
        self.call()
        return np.full(4, 7)[rows]


def test_a_second_writer_is_refused(folder):
    before = listing(folder)

    def second():
        with pytest.raises(
            BlockingIOError, match=r"model is being written by another .* unchanged"
        ):
            write_folder(folder, {"x": np.zeros(4)}, CONFIG)
        assert listing(folder) == before

    write_folder(folder, {"x": Slow(second)}, CONFIG)
    assert value(folder) == [7] * 4
    assert os.listdir(folder.parent) == ["model"]


def test_a_second_writer_into_a_new_folder_is_refused(tmp_path):
    def second():
        with pytest.raises(BlockingIOError, match="is being written by another process"):
            wush.save(tmp_path / "model", pair())

    write_folder(tmp_path / "model", {"x": Slow(second)}, CONFIG)
    assert value(tmp_path / "model") == [7] * 4


def test_a_lock_on_a_folder_that_moved_is_nobodys(tmp_path):
    (tmp_path / "a").mkdir()
    open_folder = os.open

    def slow_open(path, flags, *args):
        handle = open_folder(path, flags, *args)
        os.rename(path, tmp_path / "b")  # whoever was first has finished meanwhile
        (tmp_path / "a").mkdir()
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", slow_open)
        with pytest.raises(BlockingIOError), sole_writer(tmp_path / "a", "a"):
            pass


KILLED = """
import os, signal, sys
import numpy as np
from wush_jax.storage import folder_writer

step, move = sys.argv[2], os.replace
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def replace(source, target):
    move(source, target)
    if str(target).endswith(".old"):
        die()
if step == "shards":
    folder_writer.write_tensors = die
else:
    os.replace = replace
folder_writer.write_folder(
    sys.argv[1], {"x": np.ones(4)}, {"quantization_config": {"quant_method": "wush"}})
"""


@pytest.mark.parametrize("step", ["shards", "rename"])
def test_a_killed_writer_is_cleared_away(step, folder):
    root = Path(wush.__file__).parents[1]
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), step],
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    left = sorted(os.listdir(folder.parent))
    if step == "shards":
        assert left == [".model.new", "model"]
        assert value(folder) == [0, 1, 2, 3]
    else:
        # Between two renames: the old one is whole, and messages say where.
        assert left == [".model.new", ".model.old"]
        with pytest.raises(ValueError, match=r"the one that was to be replaced is .*\.model\.old"):
            TensorFolder(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder_writer, "write_tensors", full_disk)
            with pytest.raises(OSError, match="No space"):
                write_folder(folder, {"x": np.zeros(4)}, CONFIG)
        assert value(folder) == [0, 1, 2, 3]
    write_folder(folder, {"x": np.full(4, 9)}, CONFIG)
    assert value(folder) == [9] * 4
    assert os.listdir(folder.parent) == ["model"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["save", "export"])
def test_a_full_disk_leaves_the_old_checkpoint(call, tmp_path, monkeypatch):
    wush.save(tmp_path / "native", pair())
    write = {
        "save": lambda: wush.save(tmp_path / "model", pair()),
        "export": lambda: interchange.export(tmp_path / "model", tmp_path / "native", "fp_quant"),
    }[call]
    write()
    before = listing(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(folder_writer, "write_tensors", full_disk)
        with pytest.raises(OSError, match="No space left on device; what was there is unchanged"):
            write()
    assert listing(tmp_path / "model") == before
    assert sorted(os.listdir(tmp_path)) == ["model", "native"]
    write()


def save_once(path):
    try:
        wush.save(path, pair())
    except BlockingIOError:
        return "refused"
    return "saved"


def test_several_threads_save_one_at_a_time(tmp_path):
    with multiprocessing.pool.ThreadPool(4) as pool:
        ends = pool.map(save_once, [tmp_path / "model"] * 12)
    assert set(ends) <= {"saved", "refused"}
    assert "saved" in ends
    # Codes and scales on every device: records have no negative zeros.
    loaded = wush.load(tmp_path / "model", Pair(nnx.Rngs(1)), implementation="reference")
    assert model_arrays(loaded) == model_arrays(pair())
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_is_replaced_while_it_is_read(folder):
    opened = TensorFolder(folder)
    write_folder(folder, {"x": np.zeros(4, np.int64)}, CONFIG)
    with pytest.raises(ValueError, match=r"model\.safetensors changed while it was read"):
        opened.read("x", [np.int64], [(4,)])


def test_links_of_the_cache_are_followed_and_no_others(tmp_path, folder):
    cache = tmp_path / "models--x"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(cache / "blobs" / f"hash-{name}")
        (cache / "snapshots" / "abc" / name).symlink_to(f"../../blobs/hash-{name}")
    assert value(cache / "snapshots" / "abc") == [0, 1, 2, 3]
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(cache / "blobs" / f"hash-{name}")
    with pytest.raises(ValueError, match=r"is a link to .* outside of its folder"):
        TensorFolder(folder)
