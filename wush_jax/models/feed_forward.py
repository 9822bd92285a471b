"""Gated feed-forward layers: dense, or a mixture of experts that each token is sent to."""

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.reference import swiglu
from wush_jax.layers.ragged_linear import RaggedLinear
from wush_jax.layers.siblings import call_gated, call_together, normed_gated
from wush_jax.models.config import LlamaConfig


def gate_with(config: LlamaConfig, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return what a gated layer passes on: ``act(gate) * up``, rounded once.

    With ``swiglu_limit``: ``g sigmoid(alpha g) (up + 1)``, g = gate up to the limit, and up within
    it (gpt-oss).

    Source: Shazeer, GLU Variants Improve Transformer (2020); gpt-oss model card (2025).
    """
    dtype = gate.dtype
    if config.swiglu_limit is None and config.hidden_act == "silu":
        return swiglu(gate, up)
    gate, up = (y.astype(jnp.promote_types(dtype, jnp.float32)) for y in (gate, up))
    if config.swiglu_limit is None:
        return (jax.nn.gelu(gate, approximate=True) * up).astype(dtype)
    gate = jnp.minimum(gate, config.swiglu_limit)
    up = jnp.clip(up, -config.swiglu_limit, config.swiglu_limit)
    return (gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)).astype(dtype)


class MLP(nnx.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype):
        self.config = config
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kinds["use_bias"] = config.mlp_bias
        self.gate_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.up_proj = nnx.Linear(config.hidden_size, config.intermediate_size, **kinds)
        self.down_proj = nnx.Linear(config.intermediate_size, config.hidden_size, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map each position of ``x`` by itself."""
        if self._gated:
            return self.down_proj(call_gated(self.gate_proj, self.up_proj, x))
        gate, up = call_together([self.gate_proj, self.up_proj], x)
        return self.down_proj(gate_with(self.config, gate, up))

    def normed(
        self, norm: nnx.Module, x: jax.Array, residual: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return what calling gives for ``norm(x + residual)``, and the sum."""
        if self._gated:
            fed, total = normed_gated(norm, self.gate_proj, self.up_proj, x, residual)
            return self.down_proj(fed), total
        total = x + residual
        return self(norm(total)), total  # type: ignore[operator]

    @property
    def _gated(self) -> bool:
        return self.config.hidden_act == "silu" and self.config.swiglu_limit is None


class Router(nnx.Module):
    """Chooses experts for tokens (T, hidden): their numbers and weights, both (T, chosen).

    Logits are float32; weights are the chosen experts' probabilities, ``norm_topk_prob`` divides
    them by their sum. Its matrix is small and decides where tokens go: it is never quantized.
    """

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype):
        self.config = config
        shape = config.hidden_size, config.num_experts
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, param_dtype))
        if config.mlp_bias:
            self.bias = nnx.Param(jnp.zeros(config.num_experts, param_dtype))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return (numbers int32, weights float32) of each token's experts, the best first."""
        kernel = self.kernel[...].astype(x.dtype)
        logits = jnp.dot(x, kernel, preferred_element_type=jnp.float32)
        if self.config.mlp_bias:
            logits += self.bias[...].astype(jnp.float32)
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return chosen, weights


class Experts(nnx.Module):
    """The feed-forward layers of all experts: rows (M, hidden) sorted by expert to the same."""

    def __init__(self, config: LlamaConfig, *, rngs, dtype, param_dtype):
        self.config = config
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kinds |= {"use_bias": config.mlp_bias, "experts": config.num_experts}
        hidden, width = config.hidden_size, config.expert_width
        self.gate_proj = RaggedLinear(hidden, width, **kinds)
        self.up_proj = RaggedLinear(hidden, width, **kinds)
        self.down_proj = RaggedLinear(width, hidden, **kinds)

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Send each group of rows through its expert."""
        gate, up = call_together([self.gate_proj, self.up_proj], x, group_sizes)
        return self.down_proj(gate_with(self.config, gate, up), group_sizes)


class SparseMLP(nnx.Module):
    """A mixture of experts: each token's outputs of those that the router chose, weighted.

    Source: Shazeer et al., Outrageously Large Neural Networks (2017).
    """

    def __init__(self, config: LlamaConfig, **kinds):
        self.router = Router(config, **kinds)
        self.experts = Experts(config, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map each position of ``x`` by itself."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self.router(tokens)
        # Stable, so that an expert reads its tokens in their order.
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts.config.num_experts)
        rows = self.experts(tokens[order // chosen.shape[1]], sizes.astype(jnp.int32))
        # Back in the order of tokens; a token's terms are summed in float32.
        outputs = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
        outputs = outputs.reshape(*chosen.shape, -1).astype(jnp.float32)
        return jnp.einsum("tch,tc->th", outputs, weights).astype(x.dtype).reshape(x.shape)
