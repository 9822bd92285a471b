"""``run.jsonl``: what a run was asked, on what, and what each layer gave and took."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from wush_jax.calibration.observe import Progress
from wush_jax.calibration.report import Report
from wush_jax.checkpoints.content import library_version
from wush_jax.formats import Format
from wush_jax.solvers.recipe import Recipe, Rules

FILE = "run.jsonl"


class RunLog:
    """Lines of JSON, written as they come; a run that goes on adds to them.

    Args:
      folder: where `FILE` is; made if it is not there.
      rules: resolved: what every layer gets.
      **asked: what else the run was given.
    """

    def __init__(self, folder: Path, rules: Rules, **asked: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.start = folder / FILE, time.perf_counter()
        self.now, self.since = "", self.start
        self.seconds: dict[str, float] = {}
        versions = {"wush": library_version(), "jax": jax.__version__}
        self._write(
            event="start",
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={**versions, "python": platform.python_version()},
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            rules=_rules(rules),
            **asked,
        )

    def following(self, progress: Progress) -> Progress:
        """Return a progress callback that also notes how long each step takes."""

        def update(done: int, of: int | None, what: str) -> None:
            self._step(what)
            progress(done, of, what)

        if hasattr(progress, "weigh"):  # the costs of steps are the bar's
            vars(update)["weigh"] = progress.weigh
        return update

    def _step(self, what: str) -> None:
        if what == self.now:
            return
        now = time.perf_counter()
        if self.now:
            seconds = now - self.since
            self.seconds[self.now] = self.seconds.get(self.now, 0.0) + seconds
            self._write(event="step", step=self.now, seconds=round(seconds, 3))
        self.now, self.since = what, now

    def end(self, report: Report) -> None:
        """Write each layer's figures, with the seconds of its site, and the sums."""
        self._step("")
        for layer in report.layers:
            figures = {name: value for name, value in asdict(layer).items() if value is not None}
            if layer.site in self.seconds:
                figures["seconds"] = round(self.seconds[layer.site], 3)
            self._write(event="layer", **figures)
        self._write(
            event="end",
            seconds=round(time.perf_counter() - self.start, 3),
            bits_per_weight=report.bits_per_weight,
            bytes_after=report.bytes_after,
            **report.details,
        )

    def _write(self, **record: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")


def _rules(rules: Rules) -> list[Any]:
    """Return rules as JSON: patterns with the fields of their recipes."""
    pairs = [(".*", rules)] if isinstance(rules, Recipe) else rules
    return [[pattern, None if recipe is None else _fields(recipe)] for pattern, recipe in pairs]


def _fields(recipe: Recipe) -> dict[str, Any]:
    fields = {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
    return {n: repr(value) if isinstance(value, Format) else value for n, value in fields.items()}
