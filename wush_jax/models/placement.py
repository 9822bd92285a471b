"""Where the tensors of a decoder go: slices straight from the file to the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

#: One sharding for all tensors, or a function of a tensor's name in the files, for the array as
#: the model holds it; None is where jax puts it.
Placement = Sharding | Callable[[str], Sharding | None] | None

SPLIT_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
SPLIT_INPUTS = ("o_proj", "down_proj")
PACKED = ("e2m1", "codes", "scale_quant")


def compiled_mesh(mesh: Mesh) -> Mesh:
    """Return a mesh of the same devices and axes, all of type Auto.

    A decoder names no shardings between its layers: they are the compiler's to choose, which
    explicit axes, as the newest `jax.make_mesh` makes them, would forbid.

    >>> compiled_mesh(jax.make_mesh((1,), ("model",))).axis_types
    (Auto,)
    """
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return mesh if mesh.axis_types == types else Mesh(mesh.devices, mesh.axis_names, types)


def tensor_parallel(mesh: Mesh, axis: str = "model") -> Callable[[str], NamedSharding]:
    """Return the placement that splits a decoder's layers over one axis of a mesh.

    Projections from the residual stream are split by outputs, those back to it by inputs, those of
    every expert alike, the embedding by tokens; norms, routers, transforms and scalars are on every
    device. Good for the plain
    weights of :func:`load_pretrained` and the quantized ones of :func:`wush_jax.load`.

    Args:
        mesh: of devices; explicit axes are taken as `compiled_mesh` does.
        axis: its axis to split over; must divide heads, widths and vocabulary.

    Raises:
        ValueError: if the mesh has no such axis.

    Source: Shoeybi et al., Megatron-LM (2019), section 3.

    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> tuple(tensor_parallel(mesh)("model.layers.0.mlp.down_proj.weight").spec)
    ('model', None)
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r} is none of the mesh's {mesh.axis_names}; choose one")
    mesh = compiled_mesh(mesh)

    def placement(name: str) -> NamedSharding:
        layer, _, part = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        spec = PartitionSpec()
        if layer in SPLIT_OUTPUTS + SPLIT_INPUTS:
            by_outputs = layer in SPLIT_OUTPUTS
            every = (None,) if ".experts." in name else ()  # stacks of them in front
            if part == "weight":  # held as (K, N)
                spec = PartitionSpec(*every, *((None, axis) if by_outputs else (axis, None)))
            elif part in PACKED:  # held as (N, ...)
                spec = PartitionSpec(*every, *((axis, None) if by_outputs else (None, axis)))
            elif part == "bias" and by_outputs:
                spec = PartitionSpec(*every, axis)
        elif layer == "embed_tokens":
            spec = PartitionSpec(axis, None)
        return NamedSharding(mesh, spec)

    return placement


#: What a decoder divides: heads, widths, tokens. Fewer heads of keys than devices are repeated.
DIVIDED = ("num_attention_heads", "intermediate_size", "vocab_size")


def check_divides(config: Any, parts: int) -> None:
    """Raise ValueError, with all sizes, where a decoder does not divide over so many devices.

    Args:
        config: a `wush_jax.models.LlamaConfig`.
        parts: devices.

    >>> from wush_jax.models import LlamaConfig
    >>> check_divides(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
    ...                           num_hidden_layers=1, num_attention_heads=2), 2)
    """
    sizes = {name: getattr(config, name) for name in DIVIDED}
    faults = [f"{name}={size}" for name, size in sizes.items() if size % parts]
    if faults:
        fit = [n for n in range(1, 65) if not any(size % n for size in sizes.values())]
        raise ValueError(
            f"{', '.join(faults)} do not divide over {parts} devices; this model does over {fit}"
        )


def place(name: str, value: np.ndarray, dtype: Any, placement: Placement) -> jax.Array:
    """Put a tensor on its devices, each slice of it copied by itself.

    Args:
        name: of the tensor in the files.
        value: may be a view of a file: nothing of it outlives the call.
        dtype: of the result.
        placement: where.
    """
    sharding = placement(name) if callable(placement) else placement
    if sharding is None:
        return jax.device_put(np.array(value, dtype, order="C"))
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: np.array(value[index], dtype, order="C")
    )
