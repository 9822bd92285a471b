"""Tokens a second of a Llama-3.1-8B- or 70B-shaped decoder: packed 4-bit weights against BF16.

    python examples/bench_generate.py                    # on a GPU: 8B shapes, both, a table
    python examples/bench_generate.py --mesh model=2     # the same, divided over two GPUs
    python examples/bench_generate.py --shape 70b --layers 10 --mesh model=2
    python examples/bench_generate.py --shape small --new 4    # to see it run anywhere

A variant is BF16, a format (W4A4), or a format and that of its activations, as MXFP4-FP8 (W4A8);
behind a +, "norms" leaves the norms to XLA, "head" quantizes the head, too, its inputs to FP8.

Weights are random and the same in every layer; transforms are per block, as WUSH's are, and layers
that share an input share them. Each variant runs in a process of its own, one after the other, and
one that fails leaves the others alone. Decoding is a loop of `--new` steps over a cache of 32
positions and these, prefill the logits of one prompt of 4096 tokens. Compiling is the loop's, of
the largest batch. Memory is what a device holds once the model is built, and what it takes at the
most while a loop or a prompt runs, as XLA has planned it.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

import wush_jax as wush
from pallas_kernels.benchmarks.measure import kernels_of
from wush_jax.layers.kernel_layout import pack_for_kernels
from wush_jax.layers.nnx import dense_layers
from wush_jax.layers.swap import swap
from wush_jax.models import Llama, LlamaConfig, tensor_parallel
from wush_jax.solvers.site import quantize_site

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500_000.0,
    tie_word_embeddings=False,
)
SMALL = dataclasses.replace(
    LLAMA_8B,
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
)
LLAMA_70B = dataclasses.replace(
    LLAMA_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
)
SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B, "small": SMALL}
PROMPT = 32  # positions before those that are generated
SITES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class Norm(nnx.RMSNorm):
    """A norm that no kernel takes for its own."""


def build(config, recipe, attention=None, placement=None, head=None):
    """Return a decoder with random weights: bfloat16, or by a recipe wherever sites are."""
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    kinds["attention_implementation"] = attention
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **kinds))
    if recipe is not None:
        layers, _ = dense_layers(model)
        packed = {}
        for site in SITES:
            first = random_site([f"layers.0.{name}" for name in site], layers, recipe)
            for i in range(config.num_hidden_layers):
                packed |= zip((f"layers.{i}.{name}" for name in site), copies(first), strict=True)
        if head is not None:
            (packed["lm_head"],) = random_site(["lm_head"], layers, head)
        model = swap(model, layers, packed)
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten_with_path(state)
    filled = []
    for i, (path, leaf) in enumerate(leaves):
        sharding = None if placement is None else placement(name_of(path))
        filled.append(random_array(i, leaf, sharding))
    model = nnx.merge(graph, jax.tree.unflatten(tree, filled))
    if recipe is not None:
        pack_for_kernels(model)
    return model


def name_of(path):
    """The name that a placement knows a variable by, as in files."""
    keys = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    *layer, part = [key for key in keys if key != "value"]
    files = {"kernel": "weight", "embedding": "weight", "scales": "scale_quant"}
    return ".".join([*layer, files.get(part, part)])


def random_array(seed, leaf, sharding):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if sharding is None else jax.device_put(leaf, sharding)
    if len(leaf.shape) == 1:
        return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), sharding)
    return random_normal(seed, leaf.shape, leaf.dtype, sharding)


def random_normal(seed, shape, dtype, sharding=None):
    return drawing(shape, jnp.dtype(dtype), sharding)(seed)


@functools.cache
def drawing(shape, dtype, sharding):
    """Normal numbers by their seed; compiled once for all arrays alike."""

    def draw(seed):
        return (jax.random.normal(jax.random.key(seed), shape) * 0.02).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def random_site(paths, layers, recipe):
    """Random weights of the layers of one site, quantized with one transform a block."""
    shapes = [layers[path].contraction.shape for path in paths]
    weights = [random_normal(i, s, jnp.float32) for i, s in enumerate(shapes)]
    d = recipe.block
    x = jax.random.normal(jax.random.key(0), (shapes[0][1] // d, 4 * d, d))
    moment = jnp.einsum("bti,btj->bij", x, x, precision="highest") / (4 * d)
    return jax.jit(quantize_site, static_argnums=2)(weights, moment, recipe)


def copies(site):
    """The packed weights of a site once more, in memory of their own, one transform for all."""
    transform = jnp.copy(site[0].transform)
    return [
        dataclasses.replace(jax.tree.map(jnp.copy, packed), transform=transform) for packed in site
    ]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A compiled program: how to run it once, for its seconds, and what it took to compile."""

    seconds: object
    compiling: float
    gib: float


def memory_of(compiled):
    """GiB that a program takes on a device, its arguments among them."""
    found = compiled.memory_analysis()
    if found is None:
        return 0.0
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return (found.argument_size_in_bytes + new + found.temp_size_in_bytes) / 2**30


def apart(model):
    """A model's arrays as a list, which a call goes through in no time, and how to put it back."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    return leaves, lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def decoding(model, batch, new):
    """Compile a loop of so many steps."""
    state, merged = apart(model)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def loop(state, chosen, cache):
        model = merged(state)

        def step(_, carry):
            chosen, cache = carry
            logits, cache = model.decode(chosen, cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, new, step, (chosen, cache))

    first, lengths = jnp.zeros(batch, jnp.int32), jnp.full(batch, PROMPT, jnp.int32)
    read = functools.partial(Llama.prefill, max_length=PROMPT + new)
    _, shapes = nnx.eval_shape(read, model, jnp.zeros((batch, PROMPT), jnp.int32), lengths)
    start = time.perf_counter()
    compiled = loop.lower(state, first, shapes).compile()
    compiling = time.perf_counter() - start

    def seconds():
        cache = dataclasses.replace(jax.tree.map(jnp.zeros_like, shapes), lengths=lengths + 0)
        return timed(compiled, state, first + 0, cache)

    return Phase(seconds, compiling, memory_of(compiled))


def timed(compiled, *arguments):
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def reading(model, length):
    """Compile the logits of one prompt."""
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, model.config.vocab_size)
    state, merged = apart(model)

    @jax.jit
    def last(state, tokens):
        return merged(state).prefill(tokens, jnp.array([length]), length)

    start = time.perf_counter()
    compiled = last.lower(state, tokens).compile()
    compiling = time.perf_counter() - start
    return Phase(lambda: timed(compiled, state, tokens), compiling, memory_of(compiled))


def placement_of(mesh):
    """The placement that ``model=N`` asks for, or None."""
    if mesh is None:
        return None
    axis, _, count = mesh.partition("=")
    axes = {"axis_types": (jax.sharding.AxisType.Auto,), "devices": jax.devices()[: int(count)]}
    return tensor_parallel(jax.make_mesh((int(count),), (axis,), **axes), axis)


def recipe_of(name):
    """The recipe of a variant, None for BF16."""
    weights, _, inputs = name.partition("-")
    if weights == "BF16":
        return None
    recipe = wush.Recipe(format=getattr(wush, weights))
    return recipe.replace(activation_format=getattr(wush, inputs)) if inputs else recipe


def measure(options):
    """One variant: a line of JSON."""
    name, *more = options.variant.split("+")
    config = SHAPES[options.shape]
    if options.layers:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    recipe = recipe_of(name)
    head = recipe.replace(activation_format=wush.FP8) if "head" in more else None
    start = time.perf_counter()
    model = build(config, recipe, options.attention, placement_of(options.mesh), head)
    said = f"{options.variant}: built in {time.perf_counter() - start:.0f} s"
    print(said, file=sys.stderr, flush=True)
    if "norms" in more:
        for _, module in nnx.iter_modules(model):
            if type(module) is nnx.RMSNorm:
                module.__class__ = Norm
    result = {"variant": options.variant, "device": jax.devices()[0].device_kind}
    result["layers"] = config.num_hidden_layers
    result["weights_gib"] = held("bytes_in_use")
    for batch in options.batches:
        loop = decoding(model, batch, options.new)
        print(f"{options.variant}: compiled in {loop.compiling:.0f} s", file=sys.stderr, flush=True)
        best = min(loop.seconds() for _ in range(4))
        result[f"tokens_per_second_{batch}"] = batch * options.new / best
        result[f"gib_{batch}"], result["compile_seconds"] = loop.gib, loop.compiling
        if options.kernels:
            result[f"kernels_{batch}"] = kernels_of(loop.seconds, options.new)
        del loop
    read = reading(model, 64 if options.shape == "small" else 4096)
    result["prefill_seconds"] = min(read.seconds() for _ in range(4))
    result["prefill_gib"], result["prefill_compile_seconds"] = read.gib, read.compiling
    if options.kernels:
        result["kernels_prefill"] = kernels_of(read.seconds, 1)
    result["peak_gib"] = held("peak_bytes_in_use")
    print(json.dumps(result), flush=True)


def held(what):
    """GiB of the fullest device."""
    stats = [device.memory_stats() or {} for device in jax.devices()]
    return max(s.get(what, 0) for s in stats) / 2**30


def line_of(row, base, batches):
    """One variant in words, beside the first."""
    speeds = "  ".join(
        f"batch {b}: {row[key]:8.1f} tokens/s ({row[key] / base[key]:.3f}x)"
        for b in batches
        for key in [f"tokens_per_second_{b}"]
    )
    seconds = row["prefill_seconds"]
    return (
        f"{row['variant']:15s} {speeds}  prefill {seconds * 1e3:7.1f} ms"
        f" ({base['prefill_seconds'] / seconds:.3f}x)  GiB: {row['weights_gib']:.2f} built,"
        f" {max(row[f'gib_{b}'] for b in batches):.2f} decoding, {row['prefill_gib']:.2f} reading,"
        f" {row['peak_gib']:.2f} at the peak  compiled in {row['compile_seconds']:.0f} s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--mesh", help="divide the weights over devices: model=N")
    parser.add_argument("--variants", nargs="*", default=["BF16", "MXFP4", "NVFP4"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--new", type=int, default=256, help="tokens to generate")
    parser.add_argument("--layers", type=int, help="fewer decoder layers")
    parser.add_argument("--attention", help='of jax.nn.dot_product_attention: "cudnn" or "xla"')
    parser.add_argument("--kernels", action="store_true", help="list them, with their times")
    parser.add_argument("--output", help="JSON file for the figures")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.new < 1:
        parser.error(f"--new {options.new}: at least 1 step")
    if options.variant:
        measure(options)
        return
    rows = []
    for variant in options.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{variant}: failed", flush=True)
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line_of(rows[-1], rows[0], options.batches), flush=True)
        if options.output:
            pathlib.Path(options.output).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
