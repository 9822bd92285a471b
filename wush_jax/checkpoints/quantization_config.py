"""What ``config.json`` says about quantized layers: formats and records, to JSON and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from wush_jax.formats import Format, elements
from wush_jax.formats.elements import Element, FloatElement, IntElement

METHOD = "wush"
LAYOUT = 1
FLOAT_ELEMENTS = (elements.E2M1, elements.E2M3, elements.E3M2, elements.E4M3, elements.E5M2)


@dataclass(frozen=True)
class LayerRecord:
    """What a quantized layer's tensors do not say themselves.

    Attributes:
      shape: (N, K), or (*batch, N, K) of several kernels.
      format: of the weight.
      input_format: of the activations, or None.
      block: channels per transform block d, or None without a transform.
      site: name of the layer with which it shares one transform variable (the first of a site, so
        its own name there), or None without a transform.
      global_scale: of the weight, dividing; exact, where the stored reciprocal is rounded. A
        float, or nested lists of them.
      input_global_scale: of the activations, dividing, or None for the format's own.

    Raises:
      ValueError: groups or blocks that do not tile K.
    """

    shape: tuple[int, ...]
    format: Format
    input_format: Format | None
    block: int | None
    site: str | None
    global_scale: Any
    input_global_scale: Any

    def __post_init__(self):
        k = self.shape[-1]
        if min(self.shape) < 1:
            raise ValueError(f"shape={self.shape} is empty")
        for fmt in (self.format, self.input_format):
            if fmt is not None and (not fmt.holds(k) or k * fmt.element.bits % 8):
                raise ValueError(
                    f"shape={self.shape}: groups of {fmt.group_size} (group_size of {fmt.name}) "
                    f"do not tile K={k}"
                )
        if self.block is not None and (self.block < 1 or k % self.block):
            raise ValueError(f"shape={self.shape}: block={self.block} does not divide K={k}")


def records_to_json(records: Mapping[str, LayerRecord]) -> dict[str, Any]:
    """Return the ``quantization_config`` of some layers, by their names.

    >>> from wush_jax import MXFP4
    >>> record = LayerRecord((8, 32), MXFP4, None, None, None, 3.0, None)
    >>> stored = records_to_json({"up": record})
    >>> stored["formats"]["MXFP4"]["rule"], records_from_json(stored) == {"up": record}
    ('pow2_div3', True)
    """
    keys: dict[Format, str] = {}
    layers = {}
    for name, record in records.items():
        for fmt in (record.format, record.input_format):
            if fmt is not None and fmt not in keys:
                taken = fmt.name in keys.values()
                keys[fmt] = f"{fmt.name}-{len(keys)}" if taken else fmt.name
        layers[name] = {
            "shape": list(record.shape),
            "format": keys[record.format],
            "input_format": None if record.input_format is None else keys[record.input_format],
            "block": record.block,
            "site": record.site,
            "global_scale": record.global_scale,
            "input_global_scale": record.input_global_scale,
        }
    formats = {key: format_to_json(fmt) for fmt, key in keys.items()}
    return {"quant_method": METHOD, "layout": LAYOUT, "formats": formats, "layers": layers}


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``quantization_config`` with a digest of all its entries.

    What tensors cannot say decides what a folder computes: with one entry changed, FP8 for MXFP8
    activations or another group size, it would be another model without any sign of it.

    >>> sealed({"layout": 1})
    {'layout': 1, 'digest': '8954f737e150e913'}
    """
    return {**config, "digest": _digest(config)}


def _digest(config: Mapping[str, Any]) -> str:
    entries = {key: value for key, value in config.items() if key != "digest"}
    # As it will be read: keys are text there. What JSON lacks, writing refuses.
    as_read = json.loads(json.dumps(entries, default=repr))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()[:16]


def _check_seal(config: Mapping[str, Any]) -> None:
    """Raise ValueError where an entry is not what was written; files without a digest pass."""
    if "digest" in config and config["digest"] != _digest(config):
        raise ValueError(
            f"the entries of quantization_config are not those that its digest {config['digest']!r}"
            " is of: something changed them; fetch the folder again, or delete 'digest' to have "
            "what they say now"
        )


def records_from_json(config: Mapping[str, Any]) -> dict[str, LayerRecord]:
    """Undo `records_to_json`, checking everything.

    Args:
      config: a ``quantization_config``.

    Raises:
      ValueError: the entry that is missing or wrong, and what was expected.
    """
    if config.get("quant_method") != METHOD or config.get("layout") != LAYOUT:
        raise ValueError(
            f"quantization_config has quant_method={config.get('quant_method')!r}, layout="
            f"{config.get('layout')!r}; expected {METHOD!r} and {LAYOUT}: written by another "
            "library or a later version"
        )
    stored = _take(config, "formats", dict)
    formats, records = {}, {}
    for key in stored:
        with _within(f"formats {key!r}"):
            formats[key] = format_from_json(_take(stored, key, dict))
    layers = _take(config, "layers", dict)
    for name in layers:
        with _within(f"layer {name!r}"):
            records[name] = _record(_take(layers, name, dict), formats)
    for name, record in records.items():
        first = records.get(record.site or name)
        if first is None or first.site != record.site or first.block != record.block:
            raise ValueError(
                f"layer {name!r}: site={record.site!r} is not the first of a site with "
                f"block={record.block}"
            )
    _check_seal(config)
    return records


def format_to_json(fmt: Format) -> dict[str, Any]:
    """Return a format as plain values.

    Raises:
      ValueError: an element of one's own, which no reader would know.
    """
    element = fmt.element
    if isinstance(element, FloatElement) and element not in FLOAT_ELEMENTS:
        raise ValueError(f"format {fmt.name}: element {element} has no name in files")
    values = {field.name: getattr(fmt, field.name) for field in dataclasses.fields(fmt)}
    if isinstance(element, IntElement):
        return values | {"element": dataclasses.asdict(element)}
    return values | {"element": element.name}


def format_from_json(values: Mapping[str, Any]) -> Format:
    """Undo `format_to_json`.

    >>> from wush_jax import NVFP4
    >>> format_from_json(format_to_json(NVFP4)) == NVFP4
    True
    """
    scale = _scale(values, "global_scale", optional=True, scalar=True)
    return Format(
        name=_take(values, "name", str),
        element=_element(_take(values, "element", (str, dict))),
        group_size=_take(values, "group_size", int),
        scale_dtype=_take(values, "scale_dtype", str),
        rule=_take(values, "rule", str),
        global_scale=scale if scale is None else float(scale),
        short_last="short_last" in values and _take(values, "short_last", bool),
    )


def _element(value: str | Mapping[str, Any]) -> Element:
    if isinstance(value, str):
        for element in FLOAT_ELEMENTS:
            if element.name == value:
                return element
        raise ValueError(f"element={value!r} is unknown; expected e2m1, e4m3 or the like")
    with _within("element"):
        bits = _take(value, "bits", int)
        if bits not in (4, 6, 8):
            raise ValueError(f"bits={bits}, expected 4, 6 or 8")
        full = "full" in value and _take(value, "full", bool)
        return IntElement(_take(value, "name", str), bits, _take(value, "midrise", bool), full)


def _record(values: Mapping[str, Any], formats: Mapping[str, Format]) -> LayerRecord:
    shape = _take(values, "shape", list)
    if not 2 <= len(shape) <= 8 or not all(type(n) is int and 0 < n < 2**48 for n in shape):
        raise ValueError(f"shape={str(shape)[:80]}, expected [N, K]")
    key = _take(values, "format", str)
    input_key = _take(values, "input_format", (str, type(None)))
    for entry, name in (("format", key), ("input_format", input_key)):
        if name is not None and name not in formats:
            raise ValueError(f"{entry}: format {name!r} is not among {sorted(formats)}")
    block = _take(values, "block", (int, type(None)))
    site = _take(values, "site", (str, type(None)))
    if (block is None) != (site is None):
        raise ValueError(f"block={block} and site={site!r}, expected both or neither")
    return LayerRecord(
        shape=tuple(shape),
        format=formats[key],
        input_format=None if input_key is None else formats[input_key],
        block=block,
        site=site,
        global_scale=_scale(values, "global_scale"),
        input_global_scale=_scale(values, "input_global_scale", optional=True),
    )


def _scale(
    values: Mapping[str, Any], key: str, *, optional: bool = False, scalar: bool = False
) -> Any:
    if optional and key in values and values[key] is None:
        return None
    value = _take(values, key, (int, float) if scalar else (int, float, list))
    if not is_scale(value):
        raise ValueError(f"{key}={value!r}, expected positive finite numbers")
    return value


def is_scale(value: Any) -> bool:
    """Tell whether a global scale (or nested lists of them) is positive and normal in float32.

    >>> is_scale(3.0), is_scale([1.0, -1.0]), is_scale(1e39)
    (True, False, False)
    """
    limits = np.finfo(np.float32)
    try:
        array = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError):
        return False
    return bool(((array >= limits.tiny) & (array <= limits.max)).all())


@contextmanager
def _within(place: str) -> Iterator[None]:
    """Name the place of whatever is refused."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _take(values: Mapping[str, Any], key: str, kinds: type | tuple[type, ...]) -> Any:
    """Return an entry of exactly one of some types (a bool is no int)."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if key not in values or type(values[key]) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        found = repr(values[key])[:80] if key in values else "missing"
        raise ValueError(f"entry {key!r} is {found}, expected {names}")
    return values[key]
