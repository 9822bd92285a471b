"""Train the byte-level demonstration model on the sources of the standard library.

    python examples/01_train_demo_model.py --seconds 330 --out demo_model.safetensors

On one H200 this takes the seconds it is given; on a CPU try `--steps 5 --batch 4 --layers 2`.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from wush_jax.demo import load_model, save_model, stdlib_text, token_batches
from wush_jax.evaluate import bits_per_byte
from wush_jax.models import Llama, LlamaConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_model.safetensors"))
    parser.add_argument("--stdlib", type=Path, help="another standard library's folder")
    parser.add_argument("--seconds", type=float, help="time for everything; replaces --steps")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=100, help="steps in one compiled call")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def attention_implementation(config: LlamaConfig) -> str:
    """The fused attention of cuDNN where this machine takes it, else XLA's."""
    query = jnp.zeros((1, 64, config.num_attention_heads, config.head_dim), jnp.bfloat16)
    key = query[:, :, : config.num_key_value_heads]

    def total(query, key, value):
        attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        return attend(query, key, value).astype(jnp.float32).sum()

    try:
        jax.block_until_ready(jax.jit(jax.grad(total, (0, 1, 2)))(query, key, key))
    except Exception as error:  # several kinds, by jax version: none of them is worth a stop
        print(f"attention: xla, since cuDNN answers {str(error).splitlines()[0][:120]!r}")
        return "xla"
    print("attention: cudnn")
    return "cudnn"


def make_optimizer(params) -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the clock."""
    matrices = jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(0.1, mask=matrices),
    )


def learning_rate(done: jax.Array, peak: float) -> jax.Array:
    """Linear warm-up over the first 2 % of the run, then half a cosine down to 0."""
    return peak * jnp.minimum(done / 0.02, 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))))


def make_chunk(graph, optimizer, batch: int, length: int, peak: float):
    """A compiled run of one training step for each entry of `done`, batches cut on the device."""

    def loss(params, windows):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def chunk(params, state, corpus, key, done):
        def step(carry, inputs):
            params, state = carry
            key, done = inputs
            starts = jax.random.randint(key, (batch, 1), 0, corpus.size - length)
            windows = corpus[starts + jnp.arange(length + 1)].astype(jnp.int32)
            value, gradient = jax.value_and_grad(loss)(params, windows)
            updates, state = optimizer.update(gradient, state, params)
            scale = -learning_rate(done, peak)
            params = jax.tree.map(lambda p, u: p + scale * u, params, updates)
            return (params, state), value

        keys = jax.random.split(key, done.size)
        (params, state), losses = jax.lax.scan(step, (params, state), (keys, done))
        return params, state, losses.mean() / math.log(2)

    return jax.jit(chunk, donate_argnums=(0, 1))


def train(model: Llama, text: bytes, args: argparse.Namespace, begun: float, report) -> Llama:
    """Run chunks until the steps or the seconds are used; `report(model)` now and then."""
    graph, params = nnx.split(model, nnx.Param)
    optimizer = make_optimizer(params)
    state = optimizer.init(params)
    corpus, key = jnp.asarray(np.frombuffer(text, np.uint8)), jax.random.key(args.seed)
    # Compiled outside the clock of the schedule, and timed by one chunk at learning rate 0.
    still = jnp.zeros(args.chunk if args.seconds else min(args.chunk, args.steps))
    run = make_chunk(graph, optimizer, args.batch, args.length, args.rate)
    run = run.lower(params, state, corpus, key, still).compile()
    print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
    start = time.monotonic()
    params, state, bits = run(params, state, corpus, key, still)
    jax.block_until_ready(bits)
    per_step = (time.monotonic() - start) / still.size

    start, steps, reported, done = time.monotonic(), 0, 0.0, 0.0
    budget = max(args.seconds - (start - begun), 1.0) if args.seconds else None
    while done < 1:
        advance = per_step / budget if budget else 1 / args.steps
        schedule = done + advance * jnp.arange(1, still.size + 1)
        key, now = jax.random.split(key)
        params, state, bits = run(params, state, corpus, now, schedule)
        bits, steps = float(bits), steps + still.size
        elapsed = time.monotonic() - start
        per_step = elapsed / steps
        done = elapsed / budget if budget else steps / args.steps
        speed = steps * args.batch * args.length / elapsed
        print(f"{done:6.1%}  step {steps}  {bits:.4f} bits/byte  {speed:,.0f} tokens/s", flush=True)
        if done - reported >= 0.1 and done < 1:
            reported = done
            report(nnx.merge(graph, params))
    return nnx.merge(graph, params)


def main() -> None:
    begun = time.monotonic()
    args = parse_arguments()
    text = stdlib_text("train", root=args.stdlib)
    held_out = stdlib_text("evaluation", root=args.stdlib)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.length,
    )
    implementation = attention_implementation(config)
    rngs = nnx.Rngs(args.seed)
    model = Llama(config, rngs=rngs, dtype=jnp.bfloat16, attention_implementation=implementation)
    count = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{count:,} parameters, {len(text):,} bytes of text, {jax.devices()[0]}", flush=True)

    def held_out_bits(model, limit: int | None = None) -> float:
        size = {"batch": min(args.batch, 16), "length": args.length}
        return bits_per_byte(model, token_batches(held_out, **size, limit=limit))

    def report(model) -> None:
        save_model(args.out, model)  # so that a run cut short leaves its last state
        print(f"        held out {held_out_bits(model, 8):.4f} bits/byte", flush=True)

    model = train(model, text, args, begun, report)
    save_model(args.out, model)
    limit = None if jax.default_backend() == "gpu" else 2
    bits, kept = held_out_bits(model, limit), held_out_bits(load_model(args.out), limit)
    print(f"held out {bits:.4f} bits/byte as trained, {kept:.4f} from the file in float32")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, {time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
