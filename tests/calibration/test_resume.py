"""The state of a long calibration: what is written, what is refused, what a kill leaves behind."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import long_run
import numpy as np
import pytest
from tiny import BLOCKS, Blocks

import wush_jax as wush
from wush_jax.calibration.resume import RunState, digest

pytestmark = pytest.mark.once

SCRIPT = Path(long_run.__file__)
FINGERPRINT = {"model": "a", "batches": "b"}
TREE = {
    "codes": jnp.arange(6, dtype=jnp.uint8),
    "scale": jnp.float32(3),
    "scales": jnp.arange(4).astype(jnp.float8_e8m0fnu),
    "transform": jnp.ones((2, 2), jnp.bfloat16),
}


def equal(tree, other):
    assert tree.keys() == other.keys()
    for name in tree:
        assert tree[name].dtype == other[name].dtype
        assert np.asarray(tree[name]).tobytes() == np.asarray(other[name]).tobytes()


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def state(tmp_path):
    found = RunState(tmp_path / "new" / "state", FINGERPRINT, resume=False)
    found.save(0, TREE, {"rows": [1]})
    found.close()
    return found


def test_a_stage_comes_back(state):
    again = RunState(state.folder, FINGERPRINT, resume=True)
    assert (again.has(0), again.has(1)) == (True, False)
    tree, note = again.load(0, TREE)
    assert note == {"rows": [1]}
    equal(tree, TREE)
    assert sorted(contents(state.folder)) == ["run.json", "stage-00000.safetensors"]


def test_a_run_is_not_overwritten(state):
    with pytest.raises(ValueError, match="holds the state of a run; pass resume=True"):
        RunState(state.folder, FINGERPRINT, resume=False)


def test_another_run_says_what_differs(state):
    message = r"another run: batches \(b is now c\), rules \(None is now d\) differ; start"
    with pytest.raises(ValueError, match=message):
        RunState(state.folder, {"model": "a", "batches": "c", "rules": "d"}, resume=True)


def test_one_run_at_a_time(tmp_path):
    """In this process and from another; a run that failed leaves no lock behind."""
    first = RunState(tmp_path, FINGERPRINT, resume=False)
    with pytest.raises(BlockingIOError, match=r"state_dir=.* is being written by another process"):
        RunState(tmp_path, FINGERPRINT, resume=True)
    code = (
        "import sys; from wush_jax.calibration.resume import RunState; "
        "RunState(sys.argv[1], {}, resume=True)"
    )
    root = Path(wush.__file__).parents[1]
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "BlockingIOError" in other.stderr
    first.close()
    with pytest.raises(ValueError, match="belongs to another run"):
        RunState(tmp_path, {}, resume=True)
    RunState(tmp_path, FINGERPRINT, resume=True).close()


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 10**5, "\xff"])
def test_a_damaged_run_file(state, text):
    (state.folder / "run.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"run\.json is damaged .* start in another folder"):
        RunState(state.folder, FINGERPRINT, resume=True)


def cut(data):
    return data[: len(data) // 2]


def empty(data):
    return b""


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, empty, flip])
def test_a_damaged_stage_says_which_file_to_delete(state, damage):
    file = state.folder / "stage-00000.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"stage-00000\.safetensors is damaged.*; delete it"):
        state.load(0, TREE)


def test_a_stage_of_another_shape(state):
    with pytest.raises(ValueError, match="delete it to redo that stage: it holds 4 arrays, expec"):
        state.load(0, {"codes": TREE["codes"]})
    with pytest.raises(ValueError, match=r"uint8\(6,\) found, uint8\(7,\) expected"):
        state.load(0, TREE | {"codes": jnp.zeros(7, jnp.uint8)})


def test_a_full_disk_keeps_what_was_done(state, monkeypatch):
    before = contents(state.folder)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"stage 1 could not .* No space .* stages before it are"):
            state.save(1, TREE, {})
    assert contents(state.folder) == before
    state.save(1, TREE, {})
    equal(state.load(1, TREE)[0], TREE)


def test_a_file_size_limit_keeps_what_was_done(state):
    """As a quota does: the write itself fails."""
    before = contents(state.folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"stage 1 could not be written .* stages before it are"):
            state.save(1, {"codes": jnp.zeros(100_000, jnp.uint8)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(state.folder) == before


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"state_dir=.*file/state' cannot be written"):
        RunState(tmp_path / "file" / "state", FINGERPRINT, resume=False)


def test_digests_differ_by_shape_type_and_value():
    x = np.arange(10_000, dtype=np.float32)
    changed = x.copy()
    changed[:5000] += 1
    others = [x.reshape(100, 100), x.astype(np.int32), changed, x[:-1]]
    assert len({digest([array]) for array in [x, *others]}) == 5
    assert digest([x]) == digest([jnp.asarray(x)])
    assert digest([x, changed]) != digest([changed, x])


# A whole calibration.


def calibrate(state_dir, *, resume=False, seed=0, batches=None, recipe=long_run.RECIPE):
    seen = []
    result = wush.quantize_model(
        Blocks(seed),
        long_run.batches() if batches is None else batches,
        recipe,
        sequential=wush.Sequential(BLOCKS, state_dir=state_dir, resume=resume),
        progress=lambda *now: seen.append(now),
    )
    return *result, seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, report, seen = calibrate(folder / "state")
    assert [s[:2] for s in seen] == [(i + 1, long_run.PASSES) for i in range(long_run.PASSES)]
    wush.save(folder / "model", model)
    return folder, report


@pytest.mark.parametrize("deleted", [[2], [1], [0, 1, 2]])
def test_missing_stages_are_done_again(finished, deleted, tmp_path):
    folder, report = finished
    before = contents(folder / "state")
    for stage in deleted:
        (folder / "state" / f"stage-{stage:05d}.safetensors").unlink()
    model, again, seen = calibrate(folder / "state", resume=True)
    assert again == report
    assert contents(folder / "state") == before
    wush.save(tmp_path / "model", model)
    assert contents(tmp_path / "model") == contents(folder / "model")
    assert seen[-1][:2] == (long_run.PASSES, long_run.PASSES)
    kept = min(deleted)  # layers; each two sites, and one step to the next
    assert len(seen) == long_run.PASSES - 2 * long_run.BATCHES * kept


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, r"model \(\w+ is now \w+\) differ"),
        ({"batches": long_run.batches(1)}, r"batches \(\w+ is now \w+\) differ"),
        (
            {"recipe": long_run.RECIPE.replace(damping=0.1)},
            r"rules \(damping=0\.\d+ is now damping=0\.1\) differ",
        ),
    ],
)
def test_another_calibration_is_refused(finished, change, name):
    with pytest.raises(ValueError, match=f"belongs to another run: {name}"):
        calibrate(finished[0] / "state", resume=True, **change)


# Killed processes.


class Runs:
    """Programs that share compiled functions, and the result of one that nobody killed."""

    def __init__(self, folder):
        self.folder = folder
        assert self("reference", "never").returncode == 0
        self.expected = contents(folder / "out-reference")
        assert "report.json" in self.expected

    def __call__(self, name, *death):
        command = [sys.executable, SCRIPT, self.folder / "cache", self.folder / f"state-{name}"]
        command += [self.folder / f"out-{name}", *death]
        root = Path(wush.__file__).parents[1]
        return subprocess.run(
            list(map(str, command)),
            env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def stages(self, name):
        return len(list((self.folder / f"state-{name}").glob("stage-*.safetensors")))

    def ends_like_the_reference(self, name):
        return contents(self.folder / f"out-{name}") == self.expected


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("kills"))


def test_killed_runs_resume_to_the_same_bytes(runs):
    """In the second layer, then between the third's end and its name on disk, then anywhere."""
    deaths = [("pass", 9, 1), ("rename", 2, 2), ("pass", 3, 2)]
    for kind, value, stages in deaths:
        died = runs("fast", kind, value)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert runs.stages("fast") == stages
    finished = runs("fast", "never")
    assert finished.returncode == 0, finished.stderr
    assert runs.ends_like_the_reference("fast")


@pytest.mark.slow
def test_twenty_kills(runs):
    """Random points of whatever is left; a run that ends before its death starts another."""
    chance = random.Random(0)
    start = time.perf_counter()
    runs("timing", "never")
    seconds = time.perf_counter() - start
    kills = series = 0
    while kills < 20:
        death = chance.choice(
            [
                ("pass", chance.randint(1, long_run.PASSES)),
                ("rename", chance.randint(1, long_run.LAYERS)),
                ("seconds", round(chance.uniform(0.3, 0.7) * seconds, 2)),
            ]
        )
        ended = runs(series, *death)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        kills += ended.returncode != 0
        if ended.returncode == 0:
            assert runs.ends_like_the_reference(series), (series, kills)
            series += 1
    assert runs(series, "never").returncode == 0
    assert runs.ends_like_the_reference(series)
