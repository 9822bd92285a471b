"""Recipes check themselves; rules match first come, first served."""

import dataclasses
import re

import pytest

import wush_jax as wush
from wush_jax.solvers.recipe import SOLVERS, TRANSFORMS, RuleBook

pytestmark = pytest.mark.usefixtures("strict")


def test_recipes_are_static():
    recipe = wush.Recipe(format=wush.NVFP4)
    assert recipe == wush.Recipe(format=wush.NVFP4)
    assert hash(recipe) == hash(wush.Recipe(format=wush.NVFP4))
    assert recipe.replace(damping=0.1).damping == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.damping = 1.0


def test_defaults_follow_the_format():
    assert wush.Recipe().block == 32
    assert wush.Recipe(format=wush.NVFP4).block == 16
    assert wush.Recipe(format=wush.NVFP4, block_size=64).block == 64
    assert wush.Recipe().input_format is wush.MXFP4
    assert wush.Recipe(activation_format=None).input_format is None
    mixed = wush.Recipe(activation_format=wush.MXFP8)
    assert (mixed.format, mixed.input_format) == (wush.MXFP4, wush.MXFP8)
    # A group of FP8 spans blocks of any size.
    eight = wush.BEST.replace(format=wush.NVINT4, activation_format=wush.FP8)
    assert (eight.block, eight.input_format) == (16, wush.FP8)
    assert eight.replace(block_size="widest").fitted(576).block == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transform": "fft"},
            "transform='fft' is unknown; choose one of " + ", ".join(TRANSFORMS),
        ),
        ({"solver": "awq"}, "solver='awq' is unknown; choose one of " + ", ".join(SOLVERS)),
        ({"transform_dtype": "int8"}, "transform_dtype='int8' is unknown; choose one of bfloat16"),
        ({"block_size": 48}, "block_size=48 must be a multiple of group_size=32 of MXFP4"),
        ({"block_size": 0}, "block_size=0 must be a multiple of group_size=32"),
        ({"block_size": "wide"}, "block_size='wide' is unknown; choose one of widest"),
        ({"balance": 2.5}, "balance=2.5 must be from 0 (all of S on the activations) to 2"),
        ({"balance": float("nan")}, "balance=nan must be from 0"),
        (
            {"balance": 0.5, "transform": "hadamard"},
            "balance=0.5 is of transform='wush' and 'wus', not 'hadamard'",
        ),
        ({"format": wush.NVFP4, "activation_format": wush.MXFP4}, "group_size=32 of MXFP4"),
        ({"descent": 3}, "descent=3 revisits GPTQ's codes; use solver='gptq'"),
        ({"solver": "gptq", "descent": -1}, "descent=-1 must be a number of sweeps"),
        ({"refit": 2}, "refit=2 fits GPTQ's transforms; use solver='gptq'"),
        ({"solver": "gptq", "refit": -1}, "refit=-1 must be a number of rounds, 0 for none"),
        (
            {"solver": "gptq", "refit": 2, "transform": "hadamard"},
            "refit=2 needs a transform for each block; transform='hadamard' is one for all",
        ),
        ({"input_error": "model"}, "input_error='model' is GPTQ's; use solver='gptq'"),
        ({"input_error": "exact"}, "input_error='exact' is unknown; choose one of ignore, model"),
        (
            {"solver": "gptq", "input_error": "model"},
            "input_error needs the transforms before GPTQ starts; use interleave=False",
        ),
        (
            {"solver": "gptq", "block_gain": True},
            "block_gain needs the transforms before GPTQ starts; use interleave=False",
        ),
        (
            {"block_gain": True, "activation_format": None},
            "block_gain is about quantized activations; activation_format=None",
        ),
        (
            {"block_gain": True, "transform": "hadamard"},
            "block_gain=True needs a transform for each block; transform='hadamard' is one for all",
        ),
        ({"damping": -1.0}, "damping=-1.0 must be finite and non-negative; try 1e-2"),
        ({"damping": float("nan")}, "damping=nan must be finite"),
        ({"format": "mxfp4"}, "format='mxfp4' is not a Format; use wush_jax.MXFP4"),
        ({"format": wush.FP8}, "format=FP8 is for activations, activation_format=FP8; for weights"),
        (
            {"format": None},
            "format=None is not a Format; use a rule (path, None) to exclude a layer",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wush.Recipe(**options)


A, B = wush.Recipe(), wush.Recipe(format=wush.NVFP4)


def test_first_full_match_wins():
    book = RuleBook([("lm_head", None), (r"layers\.0\..*", A), (r"layers\..*_proj", B)])
    assert book.match("lm_head") is None
    assert book.match("layers.0.q_proj") is A
    assert book.match("layers.1.q_proj") is B
    assert book.match("layers.1.q_proj.weight") is None  # the whole path, not a prefix
    assert RuleBook(A).match("anything.at.all") is A


def test_unused_rules_are_reported():
    book = RuleBook([(".*head", None), (".*q_proj", A), ("layers.*q_proj", B)])
    assert book.unused(["lm_head", "layers.0.q_proj"]) == ["layers.*q_proj"]
    assert book.unused([]) == [".*head", ".*q_proj", "layers.*q_proj"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "rules is empty; pass a Recipe or a list"),
        ([("(", A)], r"entry ('(', Recipe("),
        ([A], "must be a (regular expression, Recipe or None) pair"),
        ([(".*", "wush")], "rules['.*'] is 'wush'; it must be a Recipe or None"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RuleBook(rules)
