"""Models of Flax's own modules, and of what stands between layers in others' code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from zoo_models import Case

from wush_jax.layers.linen import LinenModel

D = 32
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, D)), jnp.float32)


def linear(rngs, outputs=D, **options):
    return nnx.Linear(D, outputs, rngs=rngs, **options)


class Built(nnx.Module):
    """A module of named parts, called as a function does it."""

    def __init__(self, run, **parts):
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x):
        return self.run(self, x)


def nnx_case(run, **parts):
    """A case of parts, each made by a function of random state."""

    def make():
        rngs = nnx.Rngs(0)
        return Built(run, **{name: part(rngs) for name, part in parts.items()})

    return Case(make, X)


def linen_case(module):
    def make():
        return LinenModel(module, module.init(jax.random.key(0), X), X)

    return Case(make, X)


def attention(rngs):
    return nnx.MultiHeadAttention(2, D, decode=False, deterministic=True, rngs=rngs)


def stack(rngs):
    """Three layers in one, stacked at axis 1."""

    @nnx.vmap(in_axes=0, out_axes=1)
    def make(key):
        return nnx.Linear(D, D, rngs=nnx.Rngs(key))

    return make(jax.random.split(rngs.params(), 3))


def run_stack(m, x):
    step = nnx.scan(lambda x, m: x + jnp.tanh(m(x)), in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
    return m.head(step(x, m.layers))


def run_shared(m, x):
    step = nnx.scan(
        lambda x, m: x + jnp.tanh(m(x)), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )
    return step(x, m.a)


def run_split(m, x):
    """lax.scan over the state of layers that are stacked in front."""
    graph, state = nnx.split(m.layers)
    y, _ = jax.lax.scan(lambda x, s: (x + jnp.tanh(nnx.merge(graph, s)(x)), None), x, state)
    return m.head(y)


def front(rngs):
    make = nnx.vmap(lambda key: nnx.Linear(D, D, rngs=nnx.Rngs(key)))
    return make(jax.random.split(rngs.params(), 3))


def run_cond(m, x):
    """Both branches of a batch: the second half is the first one with the other sign."""
    way = nnx.cond
    one = way(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(x), m, x)
    two = way(x.sum() < 0, lambda m, x: m.a(x), lambda m, x: m.b(x), m, x)
    return one + two


def sequential(rngs):
    return nnx.Sequential(linear(rngs), nnx.relu, nnx.LayerNorm(D, rngs=rngs), linear(rngs))


def adapted(rngs):
    layer = nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs)
    return layer


class Holder(nnx.Pytree):
    """Layers in a pytree that is no module."""

    def __init__(self, rngs):
        self.inner = linear(rngs)

    def __call__(self, x):
        return self.inner(x)


def run_custom(m, x):
    """A layer inside of a function with a gradient of its own."""
    graph, state = nnx.split(m.a)

    def plain(state, x):
        return jnp.tanh(nnx.merge(graph, state)(x))

    function = jax.custom_vjp(plain)
    function.defvjp(lambda *given: jax.vjp(plain, *given), lambda pullback, g: pullback(g))
    return function(state, x)


def run_sharded(m, x):
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    spec = PartitionSpec("data")
    return jax.shard_map(lambda x: jnp.tanh(m.a(x)), mesh=mesh, in_specs=spec, out_specs=spec)(x)


class Attending(nnx.Module):
    """A block of a transformer, as ViT and Whisper have it: attention, perhaps across, and MLP."""

    def __init__(self, rngs, across=False):
        self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(3)])
        self.attention = attention(rngs)
        self.across = attention(rngs) if across else None
        self.up, self.down = linear(rngs, 64), nnx.Linear(64, D, rngs=rngs)

    def __call__(self, x, seen=None, mask=None):
        x = x + self.attention(self.norms[0](x), mask=mask)
        if self.across is not None:
            x = x + self.across(self.norms[1](x), seen)
        return x + self.down(nnx.gelu(self.up(self.norms[2](x))))


def blocks(rngs, across=False):
    return nnx.List([Attending(rngs, across) for _ in range(2)])


def run_vit(m, images):
    """Patches by a convolution, a class token, blocks, a head."""
    x = m.patches(images).reshape(images.shape[0], -1, D)
    token = jnp.broadcast_to(m.token[...], (images.shape[0], 1, D))
    x = jnp.concatenate([token, x], axis=1) + m.positions[...]
    for block in m.blocks:
        x = block(x)
    return m.head(m.norm(x[:, 0]))


def vit():
    case = nnx_case(
        run_vit,
        patches=lambda rngs: nnx.Conv(3, D, (4, 4), strides=4, padding="VALID", rngs=rngs),
        token=lambda rngs: nnx.Param(jnp.zeros((1, 1, D))),
        positions=lambda rngs: nnx.Param(jnp.zeros((1, 5, D))),
        blocks=blocks,
        norm=lambda rngs: nnx.LayerNorm(D, rngs=rngs),
        head=linear,
    )
    images = np.random.default_rng(0).standard_normal((8, 8, 8, 3))
    return Case(case.make, jnp.asarray(images, jnp.float32))


def run_whisper(m, features):
    """Convolutions over time, an encoder, a decoder of what it says so far."""
    x = nnx.gelu(m.strided(nnx.gelu(m.narrow(features))))
    for block in m.encoder:
        x = block(x)
    y, mask = m.tokens(jnp.arange(12).reshape(2, 6)), nnx.make_causal_mask(jnp.ones((2, 6)))
    for block in m.decoder:
        y = block(y, x, mask)
    return m.head(y)


def whisper():
    return nnx_case(
        run_whisper,
        narrow=lambda rngs: nnx.Conv(D, D, (3,), rngs=rngs),
        strided=lambda rngs: nnx.Conv(D, D, (3,), strides=2, rngs=rngs),
        tokens=lambda rngs: nnx.Embed(16, D, rngs=rngs),
        encoder=blocks,
        decoder=lambda rngs: blocks(rngs, across=True),
        head=linear,
    )


NNX_CASES = {
    "nnx, ViT": vit,
    "nnx, Whisper-like": whisper,
    "jax.custom_vjp": lambda: nnx_case(run_custom, a=linear),
    "jax.shard_map": lambda: nnx_case(run_sharded, a=linear),
    "nnx.MultiHeadAttention": lambda: nnx_case(lambda m, x: m.a(x), a=attention),
    "nnx.RNN(LSTMCell)": lambda: nnx_case(
        lambda m, x: m.o(m.r(x)),
        r=lambda rngs: nnx.RNN(nnx.LSTMCell(D, D, rngs=rngs), rngs=rngs),
        o=linear,
    ),
    "nnx.RNN(GRUCell)": lambda: nnx_case(
        lambda m, x: m.r(x), r=lambda rngs: nnx.RNN(nnx.GRUCell(D, D, rngs=rngs), rngs=rngs)
    ),
    "nnx.scan, layers stacked at axis 1": lambda: nnx_case(run_stack, layers=stack, head=linear),
    "nnx.scan, one shared layer": lambda: nnx_case(run_shared, a=linear),
    "lax.scan over split state": lambda: nnx_case(run_split, layers=front, head=linear),
    "nnx.cond": lambda: nnx_case(run_cond, a=linear, b=linear),
    "jax.vmap": lambda: nnx_case(lambda m, x: jax.vmap(m.a)(x), a=linear),
    "jax.checkpoint": lambda: nnx_case(
        lambda m, x: jax.checkpoint(lambda x: jnp.tanh(m.a(x)))(x), a=linear
    ),
    "lax.fori_loop": lambda: nnx_case(
        lambda m, x: jax.lax.fori_loop(0, 2, lambda _, x: x + jnp.tanh(m.a(x)), x), a=linear
    ),
    "nnx.jit": lambda: nnx_case(nnx.jit(lambda m, x: m.a(x)), a=linear),
    "nnx.remat": lambda: nnx_case(
        lambda m, x: nnx.remat(lambda m, x: m.b(jnp.tanh(m.a(x))))(m, x), a=linear, b=linear
    ),
    "nnx.Sequential": lambda: nnx_case(lambda m, x: m.a(x), a=sequential),
    "nnx.LoRALinear": lambda: nnx_case(lambda m, x: m.a(x), a=adapted),
    "nnx.WeightNorm": lambda: nnx_case(
        lambda m, x: m.a(x), a=lambda rngs: nnx.WeightNorm(linear(rngs), rngs=rngs)
    ),
    "nnx.Pytree": lambda: nnx_case(lambda m, x: m.b(m.a(x)), a=Holder, b=linear),
    "nnx.bridge.ToNNX": lambda: nnx_case(
        lambda m, x: m.b(m.a(x)),
        a=lambda rngs: nnx.bridge.ToNNX(nn.Dense(D), rngs=rngs).lazy_init(X),
        b=linear,
    ),
}


class Two(nn.Module):
    """Two dense layers, called in some way."""

    way: str = ""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="b")(nn.relu(nn.Dense(D, name="a")(x)))


class Twice(nn.Module):
    """One layer for all steps of a scan."""

    @nn.compact
    def __call__(self, x):
        def step(m, x, _):
            return x + jnp.tanh(nn.Dense(D, name="a")(x)), None

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, length=2)
        return scan(self, x, None)[0]


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="b")(nn.relu(nn.WeightNorm(nn.Dense(D, name="a"))(x)))


class Bridged(nn.Module):
    """A layer of NNX in a linen model, which stays as it is."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="b")(nnx.bridge.to_linen(nnx.Linear, D, D, name="a")(x))


class Shared(nn.Module):
    """Its layers' parameters are its own, as in gemma's feed forward."""

    @nn.compact
    def __call__(self, x):
        class Named(nn.Dense):
            pass

        a = nn.Dense(D, use_bias=False)
        nn.share_scope(self, a)
        return a(x)


class MaxTextLayer(nn.Module):
    """A block as MaxText writes it: fused and general projections, remat outside."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm(name="norm")(x)
        qkv = nn.DenseGeneral((3, 2, 16), use_bias=False, name="qkv")(y)
        q, k, v = qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="out")(y)
        gate = nn.silu(nn.Dense(64, use_bias=False, name="wi_0")(x))
        gate = gate * nn.Dense(64, use_bias=False, name="wi_1")(x)
        return x + nn.Dense(D, use_bias=False, name="wo")(gate), None


class MaxTextStack(nn.Module):
    """Layers scanned with their parameters stacked at axis 1."""

    axis: int = 1

    @nn.compact
    def __call__(self, x):
        block = nn.remat(MaxTextLayer, prevent_cse=False)
        scan = nn.scan(
            block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2
        )
        x, _ = scan(name="layers")(x, None)
        return nn.Dense(D, use_bias=False, name="logits_dense")(nn.RMSNorm(name="norm")(x))


class Attends(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x)


LINEN_CASES = {
    "linen nn.MultiHeadDotProductAttention": lambda: linen_case(Attends()),
    "linen nn.RNN(LSTMCell)": lambda: linen_case(nn.RNN(nn.LSTMCell(D))),
    "linen nn.scan(variable_broadcast)": lambda: linen_case(Twice()),
    "linen nn.share_scope": lambda: linen_case(Shared()),
    "linen nn.WeightNorm": lambda: linen_case(Normed()),
    "linen nnx.bridge.to_linen": lambda: linen_case(Bridged()),
    "linen nn.jit": lambda: linen_case(nn.jit(Two)()),
    "linen nn.remat": lambda: linen_case(nn.remat(Two)()),
    "linen, MaxText-like stack at axis 1": lambda: linen_case(MaxTextStack()),
    "linen, MaxText-like stack at axis -1": lambda: linen_case(MaxTextStack(-1)),
}

CASES = NNX_CASES | LINEN_CASES
