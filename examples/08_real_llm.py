"""Settings and formats on a real language model: KL, perplexity, layer loss, generation, time.

Runs on any Hugging Face folder, on a CPU or a GPU, and writes a JSON line for every setting and
draw of calibration text as soon as it is there; a run that was stopped goes on where it was:

    python examples/08_real_llm.py --model FOLDER --calibration valid.txt --evaluation test.txt
    python examples/08_real_llm.py ... --only "NVFP4 .*" --draws 1 --out nvfp4.jsonl

Texts are read with the folder's tokenizer, or come as .npy files of tokens. Without a model it
takes the embedded one, whose tokens are bytes. `examples/09_quality_page.py` makes tables and plots
of the lines.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import wush_jax as wush
from wush_jax.calibration.losses import layer_losses
from wush_jax.calibration.planning import plan
from wush_jax.calibration.site_plan import SitePlan
from wush_jax.evaluation.evaluate import score
from wush_jax.evaluation.generation import GreedyText, greedy_text, score_generation
from wush_jax.layers.nnx import dense_layers
from wush_jax.layers.swap import swap
from wush_jax.models import load_pretrained
from wush_jax.models.demo import load_demo_model, stdlib_text, token_batches
from wush_jax.models.text import Tokenizer
from wush_jax.solvers.batched import quantize_alike, solve_alike
from wush_jax.solvers.recipe import Recipe
from wush_jax.solvers.site import PackedWeight

FORMATS = (wush.MXFP4, wush.NVFP4, wush.NVINT4, wush.INT4)
SKIP = [("lm_head", None)]
WEIGHTED = " weighted"  # ends the names of settings whose calibration weighs tokens
STACKED = 30  # layers of one shape that are solved in one program


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      out: JSON lines, added to; settings and draws that it holds are not run again.
      model: a Hugging Face folder; the embedded model if not given.
      calibration: text, or tokens as .npy; needed with a model.
      evaluation: the same for held-out text.
      only: regular expression that the names of settings have to match as a whole.
      draws: random draws of calibration windows.
      samples: calibration windows in a draw.
      windows: of held-out text.
      length: tokens in a window.
      prompts: that the unquantized model continues.
      new_tokens: that it adds to each.
    """

    out: Path = Path("quality.jsonl")
    model: Path | None = None
    calibration: Path | None = None
    evaluation: Path | None = None
    only: str = ".*"
    draws: int = 3
    samples: int = 16
    windows: int = 16
    length: int = 1024
    prompts: int = 100
    new_tokens: int = 128


def settings() -> dict[str, Recipe]:
    """Return all settings by name, "NVFP4 BEST"; every layer has a transform of its own."""
    found = {}
    for fmt in FORMATS:
        plain = Recipe(format=fmt, share_transform=False)
        paper, best, wide = (
            preset.replace(format=fmt) for preset in (wush.PAPER, wush.BEST, wush.BEST_WIDE)
        )
        bare = best.replace(activation_format=None, block_gain=False)
        named = {
            **{f"rounding {t}": plain.replace(transform=t) for t in ("identity", "hadamard")},
            "rounding WUSH": plain,
            "FAST": wush.FAST.replace(format=fmt),
            "GPTQ hadamard": paper.replace(transform="hadamard"),
            "PAPER": paper,
            "PAPER balance 0.75": paper.replace(balance=0.75),
            "BEST": best,
            "BEST balance 0.75": best.replace(balance=0.75),
            "BEST refit 1": best.replace(refit=1, descent=2),
            "BEST refit 1 weighted": best.replace(refit=1, descent=2),
            "BEST no refit": best.replace(refit=0),
            "BEST aimed": best.replace(input_error="sample"),
            "BEST_WIDE": wide,
            "BEST_WIDE refit 1 weighted": wide.replace(refit=1, descent=2),
            "PAPER A16": paper.replace(activation_format=None),
            "BEST A16": bare,
            "BEST_WIDE A16": bare.replace(block_size="widest"),
            "PAPER A8": paper.replace(activation_format=wush.FP8),
            "BEST A8": best.replace(activation_format=wush.FP8),
            "BEST A8 refit 1 weighted": best.replace(
                activation_format=wush.FP8, refit=1, descent=2
            ),
            "BEST_WIDE A8": wide.replace(activation_format=wush.FP8),
        }
        found |= {f"{fmt.name} {name}": recipe for name, recipe in named.items()}
    return found


# ------------------------------------------------------------------------ solving


def solve(
    sites: Sequence[SitePlan], layers: Mapping, calibration: wush.Calibration
) -> dict[str, PackedWeight]:
    """Quantize all planned layers; those of one shape and recipe as one batch."""
    alike: dict[Any, list[tuple[str, Any]]] = {}
    for item in sites:
        assert len(item.site.layers) == 1 or not item.recipe.share_transform
        for path in item.site.layers:
            key = item.recipe, layers[path].weight_shape
            alike.setdefault(key, []).append((path, calibration.of(item.site)))
    packed = {}
    for (recipe, _), all_ in alike.items():
        for i in range(0, len(all_), STACKED):
            paths, known = zip(*all_[i : i + STACKED], strict=True)
            weights = [[layers[path].weight] for path in paths]
            names = [(path,) for path in paths]
            solved = quantize_alike(weights, known, recipe, names=names)
            packed |= {path: one for path, (one,) in zip(paths, solved, strict=True)}
    return jax.block_until_ready(packed)


# ------------------------------------------------------------------------ measuring


def scanned(model: Any, tokens: jax.Array) -> jax.Array:
    """Run a decoder whose layers are all alike as a scan: a thirtieth of the compilation."""
    graphs, states = zip(*map(nnx.split, model.layers), strict=True)
    assert all(graph == graphs[0] for graph in graphs)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def layer(hidden, state):
        return nnx.merge(graphs[0], state)(hidden), None

    return model.head(jax.lax.scan(layer, model.embed(tokens), stacked)[0])


@dataclass(frozen=True)
class Bench:
    """The model and what its quantized versions are measured on.

    Attributes:
      model: in the precision that people run it in.
      exact: in float32.
      evaluation: token batches.
      text: the float32 model's greedy text.
    """

    model: Any
    exact: Any
    evaluation: list[np.ndarray]
    text: GreedyText

    @classmethod
    def of(cls, options: Options, held_out: Any) -> Bench:
        model, exact = _models(options.model)
        windows = {"batch": 2, "length": options.length, "limit": options.windows // 2}
        evaluation = list(token_batches(held_out, **windows))
        # Prompts from all over the text.
        starts = np.linspace(0, len(held_out) - 33, options.prompts).astype(int)
        tokens = np.frombuffer(held_out, np.uint8) if isinstance(held_out, bytes) else held_out
        prompts = np.stack([tokens[i : i + 32] for i in starts])
        text = greedy_text(exact, prompts, max_new_tokens=options.new_tokens, batch=100)
        return cls(model, exact, evaluation, text)

    def measure(self, model: Any) -> dict[str, Any]:
        """Return KL, perplexity and the generation measures."""
        found = score(model, self.evaluation, self.exact, call=scanned)
        generation = score_generation(self.exact, model, self.text, batch=10, call=scanned)
        named = {f"generation_{name}": value for name, value in asdict(generation).items()}
        return {"kl": found.kl, "perplexity": found.perplexity, **named}


def _models(folder: Path | None) -> tuple[Any, Any]:
    """The model in the precision that people run it in, and in float32."""
    if folder is None:
        model = load_demo_model()
        return model, model
    half, full = (
        load_pretrained(folder, dtype=d, param_dtype=d) for d in (jnp.bfloat16, jnp.float32)
    )
    return half, full


def read(file: Path | None, folder: Path | None, part: str) -> Any:
    """Return the tokens of a text; of the embedded model's own where there is none."""
    if folder is None:
        return stdlib_text(part)
    if file is None:
        raise ValueError(f"--{part} is missing; with --model give the texts, too")
    if file.suffix == ".npy":
        return np.load(file)
    return np.asarray(Tokenizer.read(folder).encode(file.read_text("utf8")), np.int32)


# ------------------------------------------------------------------------ running


@dataclass
class Lines:
    """The results so far: a file of JSON lines."""

    file: Path
    done: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self):
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {(r["setting"], r["draw"]) for r in map(json.loads, lines)}

    def add(self, **record: Any) -> None:
        """Write a line and show it."""
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        brief = {k: v for k, v in record.items() if k not in ("layers", "typical", "details")}
        print(json.dumps(brief), flush=True)


def calibrations(
    options: Options, tokens: Any, bench: Bench, todo: Mapping[str, Recipe], draw: int
) -> dict[str, wush.Calibration]:
    """Return what a random draw of windows says of the inputs, by setting."""
    window = {"batch": 2, "length": options.length, "limit": options.samples // 2}
    found: dict[str, wush.Calibration] = {}
    for weighted in (False, True):
        mine = {n: [*SKIP, (".*", r)] for n, r in todo.items() if n.endswith(WEIGHTED) == weighted}
        if mine:
            batches = token_batches(tokens, seed=draw, **window)
            weights = "gradient" if weighted else None
            known = wush.calibrate(bench.model, batches, *mine.values(), token_weights=weights)
            found |= dict.fromkeys(mine, known)
    return found


def run(
    name: str, recipe: Recipe, draw: int, known: wush.Calibration, bench: Bench
) -> dict[str, Any]:
    """Quantize in one setting and measure."""
    planned = plan(bench.model, [*SKIP, (".*", recipe)], known)
    layers, _ = dense_layers(bench.model)
    start, programs = time.perf_counter(), solve_alike._cache_size()
    packed = solve(planned.sites, layers, known)
    seconds = time.perf_counter() - start
    compiled = solve_alike._cache_size() > programs
    sites = [item.site for item in planned.sites]
    losses = layer_losses(bench.model, bench.evaluation[0], sites, packed)
    found = bench.measure(swap(bench.model, layers, packed, "reference"))
    relative, typical = (
        {path: float(f"{getattr(loss, kind):.4g}") for path, loss in losses.items()}
        for kind in ("relative", "typical")
    )
    return {
        "setting": name,
        "draw": draw,
        **found,
        "layer_loss": float(np.exp(np.mean(np.log(list(relative.values()))))),
        "solve_seconds": None if compiled else seconds,
        "all_seconds": time.perf_counter() - start,
        "bits": planned.report.bits_per_weight,
        "transform_bytes": planned.report.details["transform_bytes"],
        "solver_flops": planned.report.details["solver_flops"],
        "layers": relative,
        "typical": typical,
    }


def main(options: Options) -> None:
    """Run every setting on every draw."""
    lines = Lines(options.out)
    chosen = {n: r for n, r in settings().items() if re.fullmatch(options.only, n)}
    if not chosen:
        raise ValueError(f"--only {options.only} matches none of {', '.join(settings())}")
    tokens, held_out = (
        read(getattr(options, part), options.model, part) for part in ("calibration", "evaluation")
    )
    bench = Bench.of(options, held_out)
    if ("unquantized", 0) not in lines.done:
        device = jax.devices()[0].device_kind
        about = {"device": device, "jax": jax.__version__, **asdict(options)}
        details = {k: v if isinstance(v, int | float) else str(v) for k, v in about.items()}
        found = bench.measure(bench.model)
        lines.add(setting="unquantized", draw=0, **found, details=details)
    for draw in range(options.draws):
        todo = {n: r for n, r in chosen.items() if (n, draw) not in lines.done}
        known = calibrations(options, tokens, bench, todo, draw)
        for name, recipe in todo.items():
            lines.add(**run(name, recipe, draw, known[name], bench))


if __name__ == "__main__":
    main(tyro.cli(Options))
