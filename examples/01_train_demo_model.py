"""Train the byte-level demonstration model on the sources of the standard library.

    python examples/01_train_demo_model.py --out demo_model.safetensors

The file keeps the state that did best on the calibration text, on which nothing is trained: after
some ten passes over 30 MB a model of this size begins to learn them by heart. One H200 takes about
two minutes; on a CPU try `--steps 5 --batch 4 --layers 2`. Other text and another shape:

    python examples/01_train_demo_model.py --text wikitext2-valid.txt wikitext2-test.txt \
        --hidden 512 --intermediate 1024 --layers 3 --kv-heads 8 --steps 3000 --out wide.safetensors
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

from wush_jax.evaluation.evaluate import bits_per_byte
from wush_jax.models import Llama, LlamaConfig
from wush_jax.models.demo import load_model, save_model, split_text, stdlib_text, token_batches


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_model.safetensors"))
    parser.add_argument("--stdlib", type=Path, help="another standard library's folder")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="train on these files instead; the last twentieth of all is for evaluation, the one "
        "before it for calibration",
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=100, help="steps in one compiled call")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=1.0, help="weight decay of matrices")
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


def make_optimizer(params, decay: float) -> optax.GradientTransformation:
    """AdamW without its learning rate."""
    matrices = jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(decay, mask=matrices),
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


def train(model: Llama, text: bytes, args: argparse.Namespace, report) -> None:
    """Run all steps in compiled chunks; `report(model)` twenty times and at the end."""
    graph, params = nnx.split(model, nnx.Param)
    optimizer = make_optimizer(params, args.decay)
    state = optimizer.init(params)
    corpus, key = jnp.asarray(np.frombuffer(text, np.uint8)), jax.random.key(args.seed)
    run = make_chunk(graph, optimizer, args.batch, args.length, args.rate)
    reported, start = 0, time.monotonic()
    for steps in range(0, args.steps, args.chunk):
        done = jnp.arange(steps + 1, min(steps + args.chunk, args.steps) + 1) / args.steps
        key, now = jax.random.split(key)
        params, state, bits = run(params, state, corpus, now, done)
        bits, steps = float(bits), steps + done.size
        if not math.isfinite(bits):
            raise SystemExit(f"The loss is {bits} at step {steps}; try a lower --rate.")
        print(f"step {steps}  {bits:.4f} bits/byte  {time.monotonic() - start:.0f} s", flush=True)
        if steps == args.steps or steps - reported >= args.steps / 20:
            reported = steps
            report(nnx.merge(graph, params))


def splits(args: argparse.Namespace) -> dict[str, bytes]:
    """Return the text for training, calibration and evaluation."""
    if args.text is None:
        names = ("train", "calibration", "evaluation")
        return {name: stdlib_text(name, root=args.stdlib) for name in names}
    return split_text(b"\n\n".join(path.read_bytes() for path in args.text))


def main() -> None:
    begun = time.monotonic()
    args = parse_arguments()
    texts = splits(args)
    text = texts["train"]
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

    limit = None if jax.default_backend() == "gpu" else 2

    def held_out_bits(model, split: str) -> float:
        size = {"batch": min(args.batch, 16), "length": args.length, "limit": limit}
        return bits_per_byte(model, token_batches(texts[split], **size))

    best = math.inf

    def report(model) -> None:
        nonlocal best
        bits = held_out_bits(model, "calibration")
        print(f"    calibration text {bits:.4f} bits/byte", flush=True)
        if bits < best:
            best = bits
            save_model(args.out, model)

    train(model, text, args, report)
    bits = held_out_bits(load_model(args.out), "evaluation")
    print(f"kept: calibration text {best:.4f}, evaluation text {bits:.4f} bits/byte (float32)")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, {time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
