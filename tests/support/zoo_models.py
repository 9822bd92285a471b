"""Small decoders of the zoos: google-tunix, DeepMind's gemma."""

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wush_jax.layers.linen import LinenModel

TOKENS = jnp.asarray(np.random.default_rng(0).integers(128, size=(2, 16)), jnp.int32)
FLOAT32 = {"dtype": jnp.float32, "param_dtype": jnp.float32}


@dataclass(frozen=True)
class Case:
    """A model of somebody else's.

    Attributes:
      make: builds it; without arguments, so that `nnx.eval_shape` takes it.
      batch: one batch.
      call: how to run it on a batch.
      alone: what is left alone on purpose, patterns of paths.
    """

    make: Any
    batch: Any
    call: Any = lambda model, batch: model(batch)
    alone: tuple[str, ...] = ()


def filled(model, scale=0.15):
    """A model with weights that are not zero, as some are at first."""
    random = np.random.default_rng(1)

    def fill(leaf):
        noise = random.standard_normal(leaf.shape)
        return jnp.asarray(leaf + 0.1 * noise if leaf.ndim <= 1 else scale * noise, leaf.dtype)

    nnx.update(model, jax.tree.map(fill, nnx.state(model, nnx.Param)))
    return model


def tunix_module(name):
    """Import one model module, without the trainers that the package imports with itself."""
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        if spec is None:
            pytest.skip("google-tunix is not installed")
        package = types.ModuleType("tunix")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["tunix"] = package
    try:
        return importlib.import_module(f"tunix.models.{name}.model")
    except ModuleNotFoundError as error:
        pytest.skip(f"google-tunix lacks {error.name}")


def decode(model, tokens):
    """Run a tunix decoder on all positions."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
    return model(tokens, positions, None, mask)[0]


SIZES = {
    "num_layers": 2,
    "embed_dim": 64,
    "hidden_dim": 96,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
LLAMA = {"vocab_size": 128, "rope_theta": 10_000, "norm_eps": 1e-6}


def _tunix(name, kind, sizes=LLAMA, **options):
    module = tunix_module(name)
    given = {
        k: v(module) if callable(v) and not isinstance(v, type) else v for k, v in options.items()
    }
    config = module.ModelConfig(**(SIZES | sizes | given))
    return Case(lambda: getattr(module, kind)(config, rngs=nnx.Rngs(0)), TOKENS, decode)


EMBED = {"num_embed": 128}
GEMMA = {"final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False}
GEMMA2 = {"final_logit_softcap": 30.0, "use_post_attn_norm": True, "use_post_ffw_norm": True}


def kinds(*names):
    return lambda module: tuple(getattr(module.AttentionType, name) for name in names)


def _gemma(config, module="gemma.gm.nn._transformer", kind="Transformer"):
    """A linen model of DeepMind's gemma."""
    found = pytest.importorskip(module, exc_type=Exception)
    model = getattr(found, kind)(config=config(found), dtype=jnp.float32)

    def make():
        return LinenModel(model, model.init(jax.random.key(0), TOKENS), TOKENS)

    return Case(make, TOKENS, lambda model, tokens: model(tokens).logits)


def _config(kinds, **options):
    def config(found):
        types = tuple(getattr(found._modules.AttentionType, name) for name in kinds)
        sizes = {k: v for k, v in SIZES.items() if k != "num_layers"}
        return found._config.TransformerConfig(
            **(EMBED | GEMMA | sizes | options), attention_types=types
        )

    return config


GEMMA_CASES = {
    "gemma, Gemma 2": lambda: _gemma(
        _config(
            ("LOCAL_SLIDING", "GLOBAL"),
            **GEMMA2,
            sliding_window_size=8,
            transpose_gating_einsum=True,
        ),
    ),
    "gemma, Gemma 3": lambda: _gemma(
        _config(
            ("LOCAL_SLIDING", "GLOBAL"), sliding_window_size=8, use_qk_norm=True, num_kv_heads=4
        ),
    ),
    "gemma, Gemma 3n": lambda: _gemma(
        _config(
            ("LOCAL_SLIDING", "GLOBAL"),
            sliding_window_size=8,
            use_altup=True,
            num_altup_inputs=2,
            per_layer_input_dim=32,
            use_laurel=True,
            laurel_rank=32,
        ),
        "gemma.gm.nn.gemma3n._transformer",
        "Gemma3nTransformer",
    ),
}

CASES = {
    "tunix Llama 3": lambda: _tunix("llama3", "Llama3"),
    "tunix Qwen 2": lambda: _tunix("qwen2", "Qwen2", **FLOAT32),
    "tunix Qwen 3": lambda: _tunix("qwen3", "Qwen3", **FLOAT32),
    "tunix Qwen 3, experts": lambda: _tunix(
        "qwen3", "Qwen3", num_experts=4, num_experts_per_tok=2, **FLOAT32
    ),
    "tunix Gemma 1": lambda: _tunix(
        "gemma",
        "Gemma",
        EMBED | GEMMA | {"num_kv_heads": 4},
        attention_types=kinds("GLOBAL", "GLOBAL"),
    ),
    "tunix Gemma 2": lambda: _tunix(
        "gemma",
        "Gemma",
        EMBED | GEMMA2,
        attn_logits_soft_cap=50.0,
        sliding_window_size=8,
        attention_types=kinds("LOCAL_SLIDING", "GLOBAL"),
    ),
    "tunix Gemma 3": lambda: _tunix(
        "gemma3", "Gemma3", EMBED, sliding_window_size=8, param_dtype=jnp.float32
    ),
    "tunix Gemma 4": lambda: _tunix(
        "gemma4",
        "Gemma4",
        EMBED,
        sliding_window_size=8,
        per_layer_input_dim=32,
        global_key_size=16,
        num_layers=3,
        frac_shared_layers=0.33,
        attention_pattern=kinds("LOCAL_SLIDING", "GLOBAL", "LOCAL_SLIDING"),
    ),
    "tunix Gemma 4, experts": lambda: _tunix(
        "gemma4",
        "Gemma4",
        EMBED,
        sliding_window_size=8,
        k_eq_v_global=True,
        global_key_size=32,
        num_global_kv_heads=2,
        enable_moe=True,
        num_experts=4,
        num_experts_per_tok=2,
        expert_dim=32,
        moe_dense_hidden_dim=96,
        attention_pattern=kinds("LOCAL_SLIDING", "GLOBAL"),
    ),
    **GEMMA_CASES,
}
