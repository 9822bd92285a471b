"""Layouts of quantized layers in files: our own and those of other libraries."""

from typing import Any

from wush_jax.checkpoints.layouts import compressed_tensors, fp_quant, gpt_oss, modelopt, wush
from wush_jax.checkpoints.layouts.encoded import ENCODED_LAYOUTS
from wush_jax.checkpoints.layouts.layout import Layout
from wush_jax.checkpoints.layouts.layout import quantization_config as _quantization_config
from wush_jax.checkpoints.packed_layout import Place
from wush_jax.solvers.site import PackedWeight
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import TensorFolder

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        wush.LAYOUT,
        fp_quant.LAYOUT,
        compressed_tensors.NVFP4_LAYOUT,
        compressed_tensors.MXFP4_LAYOUT,
        modelopt.LAYOUT,
        gpt_oss.LAYOUT,
        *ENCODED_LAYOUTS,
    )
}


def layout_of(folder: TensorFolder) -> Layout:
    """Return the layout that a folder is in.

    Args:
      folder: as `wush_jax.models.encodings.open_folder` opened it.

    Raises:
      ValueError: it is in none of ours.
    """
    for layout in LAYOUTS.values():
        if layout.claims(folder):
            return layout
    config = _quantization_config(folder)
    found = {key: str(config.get(key, "missing"))[:80] for key in ("quant_method", "format")}
    said = ", ".join(f"{key} is {value}" for key, value in found.items())
    said = f"quantization_config: {said}" if config else "no quantization_config"
    raise ValueError(
        f"{folder.path / CONFIG}: {said}; expected one of the layouts {', '.join(LAYOUTS)}: fetch "
        "the folder again, or quantize the original model"
    )


def read_all(folder: TensorFolder, place: Place) -> dict[str, PackedWeight]:
    """Return all quantized layers of a folder, by their names in files.

    Args:
      folder: in a layout that we read.
      place: from a tensor's name and values to the array that is kept.

    Returns:
      Packed weights; those of one site hold the same transform.
    """
    layout = layout_of(folder)
    layers: dict[str, PackedWeight] = {}
    transforms: dict[str, Any] = {}
    for name, record in layout.records(folder).items():
        known = transforms.get(record.site or "")
        layers[name] = layout.read(folder, name, record, place, transform=known)
        if record.site is not None:
            transforms[record.site] = layers[name].transform
    return layers
