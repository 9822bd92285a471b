"""What one family of decoders is: how its ``config.json`` is read, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wush_jax.models.typed_values import TypedValues

FULL, SLIDING = "full_attention", "sliding_attention"
Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` is read.

    Attributes:
        defaults: of keys that a file may leave out, as in transformers' configuration class.
        fields: what is the family's own, from its values; notes there what it lacks.
        theta: ``rope_theta`` where the file has none.
        written: keys that a file of this family needs to mean a `LlamaConfig`, from its fields.
    """

    defaults: Mapping[str, Any]
    fields: Callable[[TypedValues], Fields]
    theta: float = 10_000.0
    written: Callable[[Any], Fields] = field(default=lambda config: {})


MOST_LAYERS = 10_000  # each is spelled out, so that no file may ask for a billion


def count_layers(values: TypedValues) -> int:
    """Return how many layers there are."""
    return values.size("num_hidden_layers", limit=MOST_LAYERS)


def read_layer_types(values: TypedValues, *, windowed: bool, pattern: int | None = None) -> Fields:
    """Return which layers see a window: as listed, or by the family's rule.

    Args:
        values: of ``config.json``; what is wrong is noted there.
        windowed: whether there is a window at all.
        pattern: all layers but each so-many-th one; None: those from ``max_window_layers`` on.
    """
    window = values.size("sliding_window", optional=True) if windowed else None
    count = count_layers(values)
    types = values.names("layer_types")
    if types is None:
        first = 0.0 if pattern else values.number("max_window_layers", zero=True)

        def is_full(i: int) -> bool:
            return (i + 1) % pattern == 0 if pattern else i < first

        types = tuple(FULL if window is None or is_full(i) else SLIDING for i in range(count))
    counted = not {"num_hidden_layers", "layer_types"} & values.unknown
    if (counted and len(types) != count) or set(types) - {FULL, SLIDING}:
        values.faults.append(
            f"layer_types = {list(types)!r}"[:80]
            + f", expected {count} (num_hidden_layers) of {FULL!r} and {SLIDING!r}"
        )
    if window is None and SLIDING in types:
        values.faults.append("layer_types has windows, but sliding_window is null or not in use")
    if SLIDING not in types:
        return {}
    return {"sliding_window": window, "layer_types": types}


def write_layer_types(config: Any) -> Fields:
    """Return the size of the window and which layers have it, layer by layer."""
    layers = range(config.num_hidden_layers)
    types = [FULL if config.window(i) is None else SLIDING for i in layers]
    return {"sliding_window": config.sliding_window, "layer_types": types}
