"""Every command on mutated inputs: a reference's figures, or exit 2 with fault and remedy.

Folders, configs, tokenizers, files of tokens, texts and flags are drawn and edited; the reference
is transformers in float32, or numpy where that is not installed. ``--hypothesis-profile=machine``
draws 10,000 runs.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import make
from machine_runs import attempt

pytestmark = [pytest.mark.files, pytest.mark.usefixtures("float32_matmuls")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    pytest.importorskip("tokenizers")
    return make(tmp_path_factory.mktemp("world"))


@given(st.data())
def test_any_run_is_right_or_refused(world, data):
    log, fault = attempt(data.draw, world, world.folder / "run")
    assert fault is None, f"{log}: {fault}"
