"""What of a model a layout cannot hold: all of it is found, and told at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.quantization_config import LayerRecord
from wush_jax.formats import Format

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Faults:
    """Reasons why a layout cannot hold a model, with the layers that have each of them.

    >>> faults = Faults("zip")
    >>> for layer in ("up", "down"):
    ...     faults.add("has no room for {layer}: choose another", layer)
    >>> faults.check()
    Traceback (most recent call last):
    ValueError: layout='zip' has no room for up: choose another (1 more alike: down)
    """

    def __init__(self, layout: str):
        self.layout = layout
        self._found: dict[str, list[str]] = {}

    def add(self, reason: str, layer: str = "") -> None:
        """Note a reason, which goes on after the layout's name; {layer} stands for the layer's."""
        self._found.setdefault(reason, []).append(layer)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note what a check of its own raises as ValueError."""
        try:
            yield
        except ValueError as error:
            self.add(str(error).removeprefix(f"layout={self.layout!r} "))

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raise ValueError with all reasons, if there is one."""
        if self._found:
            told = "; and it ".join(self._told(*item) for item in self._found.items())
            raise ValueError(f"layout={self.layout!r} {told}")

    def _told(self, reason: str, layers: list[str]) -> str:
        others = [name for name in dict.fromkeys(layers) if name != layers[0]]
        more = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        alike = f" ({len(others)} more alike: {more})" if others else ""
        return reason.replace("{layer}", layers[0]) + alike


def only(what: str, values: Sequence[Any], faults: Faults) -> Any:
    """Return what all layers have in common, or note that they differ."""
    different = list(dict.fromkeys(values))
    if len(different) > 1:
        faults.add(
            f"holds one {what} for all layers, the model has {different[:3]}; "
            "keep layout='wush', or quantize with one recipe"
        )
    return different[0]


def fused_site(name: str) -> str:
    """Return what is the same for layers that readers compute as one: q, k and v; gate and up.

    >>> fused_site("mlp.up_proj"), fused_site("mlp.gate_proj"), fused_site("mlp.down_proj")
    ('mlp.gate_proj', 'mlp.gate_proj', 'mlp.down_proj')
    """
    parent, dot, last = name.rpartition(".")
    first = next((group[0] for group in FUSED if last in group), last)
    return f"{parent}{dot}{first}"


def check_fused(values: Mapping[str, Any], what: str, faults: Faults) -> None:
    """Note layers that readers compute as one (q, k and v; gate and up) and that differ.

    Args:
      values: by layer.
      what: they are.
      faults: of the layout.
    """
    sites: dict[str, list[str]] = {}
    for name in values:
        sites.setdefault(fused_site(name), []).append(name)
    for members in sites.values():
        if len({values[name] for name in members}) > 1:
            faults.add(
                f"needs one {what} for {{layer}}: use share_transform=True, or a format with a "
                "fixed global_scale",
                ", ".join(members),
            )


def scalar_scale(name: str, value: Any, faults: Faults) -> np.float32:
    """Return a dividing global scale; 1 where it is not one number, which is noted."""
    if np.ndim(value) == 0:
        return np.float32(value)
    faults.add(
        f"holds one global scale a layer, {{layer}} has {np.shape(value)}; keep layout='wush'", name
    )
    return np.float32(1)


def input_scale(name: str, record: LayerRecord, faults: Faults) -> np.float32:
    """Return the static global scale of a layer's quantized activations.

    Where it is found anew for each batch, that is noted, and 1 is returned.
    """
    fmt = record.input_format
    value = record.input_global_scale
    value = fmt.global_scale if value is None and fmt is not None else value
    if value is not None:
        return scalar_scale(name, value, faults)
    if fmt is not None:
        faults.add(
            "needs a static global scale of the activations, {layer} finds its own in each batch; "
            "give the format a global_scale, such as NVFP4's 10, or calibrate",
            name,
        )
    return np.float32(1)


def format_fault(fmt: Format | None, wanted: Sequence[Format | None], what: str) -> str | None:
    """Return why a format is none of the wanted ones: it decodes, or rounds, otherwise; or None.

    Args:
      fmt: of a layer; None leaves activations unquantized.
      wanted: what the layout knows. For weights the rule does not matter: any file can hold the
        scales that it chose.
      what: "weight" or "activation".
    """

    def key(f: Format | None) -> Any:
        if f is None:
            return None
        rule = f.rule if what == "activation" else None
        return f.element, f.group_size, f.scale_dtype, rule

    if key(fmt) in [key(w) for w in wanted]:
        return None
    known = " or ".join(
        "none"
        if w is None
        else f"{w.element.name}, groups of {w.group_size}, {w.scale_dtype} "
        f"scales" + (f" by rule {w.rule!r}" if what == "activation" else "")
        for w in wanted
    )
    found = "none" if fmt is None else f"{fmt.name} (rule {fmt.rule!r})"
    return (
        f"holds {what} formats {known}; {{layer}} has {found}: keep layout='wush', or quantize "
        "with such a format"
    )


def check_format(
    name: str, fmt: Format | None, wanted: Sequence[Format | None], what: str, faults: Faults
) -> None:
    """Note the `format_fault` of a layer, where there is one."""
    reason = format_fault(fmt, wanted, what)
    if reason is not None:
        faults.add(reason, name)


def as_bfloat16(name: str, transform: np.ndarray, faults: Faults) -> np.ndarray:
    """Return a transform as bfloat16; where that rounds it, that is noted."""
    rounded = transform.astype(jnp.bfloat16)
    if (rounded.astype(np.float32) != transform.astype(np.float32)).any():
        faults.add(
            f"holds transforms in bfloat16, that of {{layer}} is {transform.dtype}; quantize with "
            "transform_dtype='bfloat16'",
            name,
        )
    return rounded
