"""The decoder once more in numpy float64: loops over heads, pairs as complex numbers."""

import numpy as np


def oracle(config, tensors, tokens):
    """The forward pass again in numpy float64, loops over heads, pairs as complex numbers."""
    w = {name: t.astype(np.float64) for name, t in tensors.items()}
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = np.array([llama3(f, config.rope_scaling) for f in frequencies])
    turn = np.exp(1j * np.arange(tokens.shape[1])[:, None] * frequencies)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w[name]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def head(x, number, name):
        x = x[:, number * config.head_dim : (number + 1) * config.head_dim]
        return norm(x, f"{name}.weight") if config.qk_norm else x

    def rotate(x):
        half = config.head_dim // 2
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    def attention(x, name):
        q, k, v = (dense(x, f"{name}.{letter}_proj") for letter in "qkv")
        repeat = config.num_attention_heads // config.num_key_value_heads
        out = []
        for i in range(config.num_attention_heads):
            query = rotate(head(q, i, f"{name}.q_norm"))
            key = rotate(head(k, i // repeat, f"{name}.k_norm"))
            first = i // repeat * config.head_dim
            scores = query @ key.T / np.sqrt(config.head_dim)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out.append(weights @ v[:, first : first + config.head_dim])
        return dense(np.concatenate(out, axis=1), f"{name}.o_proj")

    def forward(row):
        x = w["model.embed_tokens.weight"][row]
        for number in range(config.num_hidden_layers):
            layer = f"model.layers.{number}"
            x = x + attention(norm(x, f"{layer}.input_layernorm.weight"), f"{layer}.self_attn")
            y = norm(x, f"{layer}.post_attention_layernorm.weight")
            gate = dense(y, f"{layer}.mlp.gate_proj")
            y = gate / (1 + np.exp(-gate)) * dense(y, f"{layer}.mlp.up_proj")
            x = x + dense(y, f"{layer}.mlp.down_proj")
        last = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return norm(x, "model.norm.weight") @ w[f"{last}.weight"].T

    return np.stack([forward(row) for row in tokens])


def llama3(frequency, scaling):
    """The three cases of transformers' ``llama3`` rope, as it spells them."""
    wavelength = 2 * np.pi / frequency
    context = scaling.original_max_position_embeddings
    if wavelength < context / scaling.high_freq_factor:
        return frequency
    if wavelength > context / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
