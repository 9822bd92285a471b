"""Promises: what ``wush quantize --max-kl`` keeps, ``wush verify`` checks; and limits of size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro
from flax import nnx

from wush_jax.calibration.auto import choose_recipes
from wush_jax.calibration.calibration import Calibration, calibrate
from wush_jax.calibration.model import quantize_model
from wush_jax.calibration.promise import Limit, kl_slopes, with_recipe
from wush_jax.calibration.report import Report
from wush_jax.commands.models import check_same_vocabulary, open_model
from wush_jax.commands.options import Source, TextFlags
from wush_jax.commands.terminal import console, progress
from wush_jax.evaluation.evaluate import kl_divergence
from wush_jax.models.tokens import in_batches
from wush_jax.solvers.presets import FAST
from wush_jax.solvers.recipe import Rules
from wush_jax.storage.json_file import read_json

CERTIFICATE = "promise.json"


def check_limit(limit: Limit, sequential: bool) -> None:
    """Refuse a limit that is none, and any where layers are quantized one after the other."""
    flags = {"--" + name.replace("_", "-"): value for name, value in limit.given.items()}
    if limit.given and (faults := limit.faults()):
        raise ValueError(f"{' '.join(f'{k} {v}' for k, v in flags.items())}: {'; '.join(faults)}")
    if flags and sequential:
        raise ValueError(f"{next(iter(flags))} is for --calibration one-shot: it needs the model")


def keep_promise(
    model: nnx.Module, inputs: Calibration | Sequence[Any], rules: Rules, limit: Limit
) -> tuple[nnx.Module, Report, dict[str, float]]:
    """Quantize a model within a limit: of KL, which is a promise, or of size.

    Args:
      model: in float32, to tell small losses apart.
      inputs: batches, the last of which is held out; or a calibration, whose first batch is then
        measured on.
      rules: which layers may be quantized.
      limit: what it has to stay within.

    Returns:
      The quantized model, its report, and the certificate: the limit, and the KL predicted and
      measured on the batch that was held out, which the report has, too.

    Raises:
      ValueError: fewer than two batches; as `wush_jax.choose_recipes`.
    """
    if isinstance(inputs, Calibration):
        known, held_out = inputs, inputs.first
    else:
        if len(inputs) < 2:
            flag = "--" + next(iter(limit.given)).replace("_", "-")
            raise ValueError(f"{flag} needs two batches or more, not {len(inputs)}: more text")
        known, held_out = calibrate(model, inputs[:-1]), inputs[-1]
    slopes = kl_slopes(model, known, with_recipe(rules, FAST), [held_out])
    given: dict[str, Any] = dict(limit.given)
    chosen, choices = choose_recipes(model, known, rules, held_out=held_out, slopes=slopes, **given)
    quantized, report = quantize_model(model, known, chosen)
    losses = {path: choice.loss for choice in choices for path in choice.site.layers}
    certificate = {
        **limit.given,
        "predicted": slopes.predict(losses),
        "measured": kl_divergence(model, quantized, [held_out]),
    }
    seen = {f"kl_{name}": float(f"{certificate[name]:.6g}") for name in ("predicted", "measured")}
    return quantized, replace(report, details={**report.details, **seen}), certificate


def verify(
    model: tyro.conf.Positional[Path],
    *,
    reference: Path,
    source: Source = TextFlags(samples=None),  # noqa: B008  # frozen
    dtype: Literal["bfloat16", "float32"] = "float32",
) -> None:
    """Measure again whether a folder keeps the promise that it was quantized under.

    Fails where it does not.

    Args:
      model: folder of a model that ``wush quantize --max-kl`` has written.
      reference: folder of the model that it came from.
      source: the text.
      dtype: of the reference's weights and activations.
    """
    promised = _promised(model)
    check_same_vocabulary(model, reference)
    batches = in_batches(source.windows(model).rows, source.batch)
    with progress(len(batches)) as update:
        original, measured = open_model(reference, dtype), open_model(model, dtype)
        kl = kl_divergence(original, measured, batches, progress=update)
    said = f"KL {kl:.6g} on this text, {promised:.6g} promised"
    if kl > promised:
        raise ValueError(f"the promise is broken: {said}")
    console().print(f"the promise is kept: {said}")


def _promised(folder: Path) -> float:
    """Return the KL that a folder's certificate promises."""
    file = folder / CERTIFICATE
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {CERTIFICATE}: nothing was promised; give what `wush quantize "
            "--max-kl` has written"
        )
    certificate = read_json(file)
    sizes = [name for name in ("max_bits", "max_bytes") if name in certificate]
    if sizes and "max_kl" not in certificate:
        raise ValueError(
            f"{file} limits the size ({sizes[0]}={certificate[sizes[0]]}) and promises no KL: "
            "`wush evaluate --reference` measures it"
        )
    promised: Any = certificate.get("max_kl")
    if type(promised) not in (int, float) or not 0 <= promised < float("inf"):
        raise ValueError(f"{file}: max_kl={promised!r}, expected nats, 0 or more; fetch it again")
    return float(promised)


def write_certificate(folder: Path, certificate: dict[str, float] | None) -> None:
    """Write what was promised beside the weights; nothing for None."""
    if certificate is None:
        return
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=1, allow_nan=False) + "\n")
