"""The Python doors on mutated arguments: the right value, or a message that names the argument.

One argument of a good call is replaced. ``--hypothesis-profile=machine`` draws 10,000 calls.
"""

import contextlib
import dataclasses
import re
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine import REMEDIES
from oracle import hadamard, random_moment
from oracle import quantize as oracle_quantize
from tiny import Net, rows

import wush_jax as wush
from wush_jax.commands.options import Text
from wush_jax.evaluation import evaluate

pytestmark = pytest.mark.once

RANDOM = np.random.default_rng(0)
W, X = (np.float32(RANDOM.standard_normal(shape)) for shape in ((8, 64), (40, 64)))
KNOWN = wush.calibrate_layer(X, rows=0)
RTN = wush.Recipe(transform="identity")
NET = Net()
DTYPES = ["f2", "f4", "f8", "i4", "u1", "?", "c16", "U1", "O", "bfloat16"]
SHAPES = [(), (64,), (0, 64), (8, 64), (2, 4, 64), (8, 0), (8, 33)]
PLAIN = [None, True, False, 0, -1, 1, 1.5, float("nan"), "x", "8", b"x", [], ["x"], {}, (), [1, 2]]
PLAIN += [object(), {"a": W}, wush.MXFP4, RTN, KNOWN, W.tolist()]
KEY = jax.random.key(0)
MOMENT = np.float32(random_moment(RANDOM, 8, 100))
MOMENTS = {"weight_moment": MOMENT, "activation_moment": MOMENT}
FUNCTIONS = [int, lambda x: x]
PACKED = wush.quantize_weight(W, KNOWN, RTN)
TABLE = np.float32(RANDOM.standard_normal((16, 16)))
TOKENS = [np.arange(12, dtype=np.int32).reshape(2, 6)]
# What is no list of a model's inputs, or of tokens.
BATCHES = [
    *([np.zeros((2, 6))], [TOKENS[0] + 5], [TOKENS[0] - 1], [TOKENS[0][:, :1]], [TOKENS[0] > 3]),
    *([(TOKENS[0], TOKENS[0] > 3)], [(TOKENS[0], TOKENS[0])], [(TOKENS[0], W[:2, :5] > 0)]),
    *([None], ["x"], [TOKENS[0], "x"], [[1, 2], [3]], [W, W[:, :33]], [W * np.nan], [W[:0]]),
]


class Tensor:
    """What torch's tensor is to us."""

    shape, ndim, dtype = (8, 64), 2, "torch.float32"


Tensor.__module__ = "torch"


def array(dtype, shape, value):
    kind = jnp.bfloat16 if dtype == "bfloat16" else dtype
    values = np.random.default_rng(1).standard_normal(shape)
    if value is not None and values.size:
        values.reshape(-1)[0] = value
    with np.errstate(all="ignore"):
        return values.astype(kind)


ARRAYS = st.builds(
    array,
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.sampled_from([None, None, np.nan, np.inf, 1e30]),
)
VALUES = st.one_of(st.sampled_from([*PLAIN, Tensor(), [Tensor()], {"a": PACKED}, PACKED]), ARRAYS)
OTHERS = {"batches": st.sampled_from(BATCHES)}
# A function is a model; what it makes of tokens is its own.
CALLED = ("model", "reference", "sharding")


def second_moment(x, **options):
    x = np.asarray(x, np.float64)
    flat = x.reshape(-1, x.shape[-1])
    return flat.T @ flat / len(flat)


def rounded(x, fmt=wush.MXFP4, **options):
    groups = np.asarray(x, np.float64).reshape(-1, fmt.group_size)
    spoilt = ~np.isfinite(groups).all(-1, keepdims=True)
    values = oracle_quantize(np.where(spoilt, 0, groups), fmt, fmt.global_scale)[2]
    return np.where(spoilt, np.nan, values).reshape(np.shape(x))


def sample_rows(x):
    return np.sort(np.asarray(x, np.float32).reshape(-1))


def table(tokens):
    return jnp.asarray(TABLE)[tokens]


def cross_entropy(batches, **models):
    """In nats, of the table."""
    logs = TABLE.astype(np.float64)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    found = []
    for batch in batches:
        tokens, mask = batch if isinstance(batch, tuple) else (batch, np.ones(batch.shape, bool))
        counted = mask[:, 1:] & mask[:, :-1]
        found.append(-logs[tokens[:, :-1], tokens[:, 1:]][counted])
    return np.mean(np.concatenate(found))


def saved(path, qmodel):
    """Save in an empty folder, and read back."""
    shutil.rmtree("folder", ignore_errors=True)
    wush.save(path, qmodel)
    return np.stack([wush.dequantize(packed.weight) for packed in wush.load(path).values()])


@contextlib.contextmanager
def folder_of_weights():
    """An empty current folder, and "weights" in it."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        wush.save("weights", {"a": PACKED})
        yield Path(name)


def transformed(x, matrix):
    """By one matrix for all blocks."""
    d = len(matrix)
    return (np.float64(x).reshape(-1, d) @ np.float64(matrix).T).reshape(np.shape(x))


# Each door: a good call, and of the values that it takes, what comes out by numpy alone.
DOORS = {
    "quantize": (
        lambda **a: wush.dequantize(wush.quantize(**a)),
        {"x": W, "fmt": wush.MXFP4},
        rounded,
    ),
    "fake_quantize": (wush.fake_quantize, {"x": W, "fmt": wush.MXFP4}, rounded),
    "dequantize": (wush.dequantize, {"q": wush.quantize(W, wush.MXFP4)}, None),
    "second_moment": (wush.second_moment, {"x": X}, second_moment),
    "calibrate_layer": (
        lambda **a: wush.calibrate_layer(**a).finalize(),
        {"x": X, "rows": 0},
        second_moment,
    ),
    "Moments.update": (
        lambda **a: wush.Moments.init(64).update(**a).finalize(),
        {"x": X},
        second_moment,
    ),
    "Moments.merge": (lambda **a: KNOWN.merge(**a).finalize(), {"other": KNOWN}, None),
    "Moments.init": (
        lambda **a: wush.Moments.init(**a).mean,
        {"size": 64, "rows": 4},
        lambda size, rows: np.zeros((size, size)),
    ),
    "Sample.of": (
        lambda **a: jnp.sort(wush.Sample.of(**a).rows.reshape(-1)),
        {"x": X},
        sample_rows,
    ),
    "Sample.init": (
        lambda **a: wush.Sample.init(**a).rows,
        {"size": 64, "rows": 4},
        lambda size, rows: np.zeros((rows, size)),
    ),
    "quantize_weight": (
        lambda **a: wush.dequantize(wush.quantize_weight(**a).weight),
        {"weight": W, "activation_moment": KNOWN, "recipe": RTN},
        lambda weight, **known: rounded(weight),
    ),
    "plan": (wush.plan, {"model": NET, "rules": RTN}, None),
    "calibrate": (wush.calibrate, {"model": NET, "batches": rows(1)}, None),
    "quantize_model": (
        wush.quantize_model,
        {"model": NET, "batches": rows(1), "rules": RTN},
        None,
    ),
    "choose_recipes": (
        lambda **a: wush.choose_recipes(**a, blocks=(32,)),
        {"model": NET, "batches": rows(2), "rules": RTN, "transforms": ("identity",)},
        None,
    ),
    "save": (
        saved,
        {"path": "folder", "qmodel": {"a": PACKED}},
        lambda path, qmodel: np.stack([rounded(W)] * len(qmodel)),
    ),
    "load": (
        lambda **a: wush.dequantize(wush.load(**a)["a"].weight),
        {"path": "weights", "model": None, "sharding": None},
        lambda **given: rounded(W),
    ),
    "perplexity": (
        wush.perplexity,
        {"model": table, "batches": TOKENS},
        lambda **given: np.exp(cross_entropy(**given)),
    ),
    "cross_entropy": (
        evaluate.cross_entropy,
        {"model": table, "batches": TOKENS},
        cross_entropy,
    ),
    "kl_divergence": (
        wush.kl_divergence,
        {"reference": table, "model": table, "batches": TOKENS},
        lambda **given: np.zeros(()),
    ),
    "hadamard_matrix": (
        wush.hadamard_matrix,
        {"n": 8, "dtype": "float32"},
        lambda n, dtype: hadamard(int(n)),
    ),
    "hadamard_transform": (
        lambda **a: wush.hadamard_transform(**a).weight,
        {"d": 8, "dtype": "float32"},
        lambda d, dtype: hadamard(int(d)),
    ),
    "identity_transform": (
        lambda **a: wush.identity_transform(**a).weight,
        {"d": 8, "dtype": "float32"},
        lambda d, dtype: np.eye(int(d)),
    ),
    "random_transform": (wush.random_transform, {"key": KEY, "d": 8, "dtype": "float32"}, None),
    "apply_transform": (
        wush.apply_transform,
        {"x": W, "matrix": np.eye(8, dtype="f4")},
        transformed,
    ),
    "wush_transform": (wush.wush_transform, MOMENTS | {"damping": 0.01, "balance": 1.0}, None),
    "predicted_gain": (wush.predicted_gain, MOMENTS | {"damping": 0.01}, None),
    "predicted_loss": (
        wush.predicted_loss,
        MOMENTS | {"transform": wush.identity_transform(8), "model": "fp"},
        None,
    ),
    "quantized_dot": (
        wush.quantized_dot,
        {"x": W, "packed": PACKED, "precision": None, "implementation": "reference"},
        None,
    ),
    "layer_loss": (wush.layer_loss, {"weight": W, "inputs": X, "packed": PACKED}, None),
    "Recipe": (wush.Recipe, {f.name: f.default for f in dataclasses.fields(wush.Recipe)}, None),
    "Format": (
        wush.Format,
        {f.name: getattr(wush.MXFP4, f.name) for f in dataclasses.fields(wush.Format)},
        None,
    ),
    "Text": (Text, {"text": "a", "length": 8, "samples": 2, "batch": 1, "seed": 3}, None),
}
DEAR = {"quantize_model", "calibrate", "choose_recipes"}


def attempt(door, name, value):
    """Return what is wrong with a call of which one argument is replaced."""
    call, good, reference = DOORS[door]
    given = {**good, name: value}
    try:
        found = call(**given)
    except (ValueError, TypeError) as error:
        said = str(error)
        named = name.replace("_", "-") if door == "Text" else name
        named += "|moments" if door == "Moments.update" else ""  # what is asked for them names them
        if not re.search(rf"\b({named})\b", said):
            return f"names no argument: {type(error).__name__}: {said[:300]}"
        told = any(
            word in said.lower() for word in (*REMEDIES, "pass ", "cast", "look for", "divisor")
        )
        return None if told else f"has no remedy: {said[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    if reference is None:
        return None
    expected = reference(**given)
    if np.shape(found) != np.shape(expected):
        return f"shape {np.shape(found)}, expected {np.shape(expected)}"
    found, expected = (np.asarray(a, np.float64).reshape(-1) for a in (found, expected))
    spoilt = ~np.isfinite(expected)  # a group with NaN is NaN as a whole
    if np.isfinite(found[spoilt]).any():
        return "finite where the reference is not"
    difference = np.abs(found[~spoilt] - expected[~spoilt])
    largest = np.max(np.abs(expected[~spoilt]), initial=0.0)
    # Two places of bfloat16, in which some are given and come out.
    return None if np.all(difference <= 2**-7 * largest) else f"off by {np.max(difference)}"


@given(st.data())
def test_any_argument_is_taken_rightly_or_named(data):
    door = data.draw(st.sampled_from(sorted(DOORS)))
    name = data.draw(st.sampled_from(sorted(DOORS[door][1])))
    values = VALUES if name in CALLED else VALUES | st.sampled_from(FUNCTIONS)
    value = data.draw(values | OTHERS.get(name, st.nothing()))
    with folder_of_weights():
        fault = attempt(door, name, value)
    assert fault is None, f"{door}({name}={value!r:.200}): {fault}"


@pytest.mark.parametrize("door", sorted(set(DOORS) - DEAR))
def test_good_calls_are_right(door):
    name, value = next(iter(DOORS[door][1].items()))
    with folder_of_weights():
        assert attempt(door, name, value) is None


@pytest.mark.parametrize("door", sorted(set(DOORS) - DEAR))
def test_the_usual_mistakes_are_named(door):
    faults = []
    for name in DOORS[door][1]:
        for value in ([8], None, "8", Tensor(), np.int64(8), np.float32(2), np.eye(8)):
            with folder_of_weights():
                fault = attempt(door, name, value)
            faults += [] if fault is None else [f"{name}={value!r:.80}: {fault}"]
    assert not faults, "\n".join(faults)
