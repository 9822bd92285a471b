"""``wush quantize --model-free``: a folder of any architecture, without its code and a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wush_jax.calibration.model_free import round_folder
from wush_jax.calibration.report import Report
from wush_jax.checkpoints.layouts import fp_quant
from wush_jax.checkpoints.layouts.wush import LAYOUT as NATIVE
from wush_jax.commands.options import rules_of
from wush_jax.commands.terminal import progress
from wush_jax.solvers.recipe import Rules


@dataclass(frozen=True)
class ModelFree:
    """Rounding without a model.

    Attributes:
      model_free: round every matrix of any folder of safetensors files to nearest, whatever its
        architecture, without a text: into the layout of --for, or ours. The transform is a Hadamard
        matrix, or the identity where readers apply none.
      rotated: with --model-free --for LAYOUT: the reader applies the transforms in the files of
        compressed-tensors: vLLM does, transformers does not.
      turned: with --model-free: regular expressions of tensors that hold (inputs, outputs).
    """

    model_free: bool = False
    rotated: bool = False
    turned: tuple[str, ...] | None = None

    def check_no_calibration(self, given: Mapping[str, Any]) -> None:
        """Refuse flags, by name, that are about a calibration."""
        flags = [f"--{name}" for name, value in given.items() if value not in (None, False)]
        if flags:
            raise ValueError(
                f"--model-free calibrates nothing: leave out {', '.join(flags)}; or leave out "
                "--model-free, for a model of a family that `wush plan` knows"
            )

    def rules(
        self, preset: str | None, recipe: Any, skip: tuple[str, ...], target: str | None
    ) -> Rules:
        """Return the rules of flags; without a transform the best that the readers apply."""
        if preset not in (None, "rtn"):
            raise ValueError(
                f"--preset {preset} needs a calibration; without one there is rtn, with "
                "--transform hadamard or identity and --scale-search sweep"
            )
        known = self.rotated or target in (None, fp_quant.NAME)
        flags = {"transform": "hadamard" if known else "identity", **recipe}
        return rules_of(preset, flags, skip, target)

    def run(
        self,
        model: Path,
        out: Path,
        rules: Rules,
        target: str | None,
        *,
        resume: bool = False,
        dry_run: bool = False,
    ) -> Report:
        """Write OUT/checkpoint and OUT/report.json, or say what would be written."""
        options: dict[str, Any] = {
            "layout": NATIVE.name if target is None else target,
            "rotated": self.rotated,
            "turned": self.turned,
        }
        if dry_run:
            return round_folder(model, out / "checkpoint", rules, plan_only=True, **options)
        state = out / "layers"
        with progress() as update:
            report = round_folder(
                model,
                out / "checkpoint",
                rules,
                state_dir=state,
                resume=resume,
                progress=update,
                **options,
            )
        report.to_json(out / "report.json")
        return report
