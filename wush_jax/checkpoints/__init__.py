"""Quantized models in files: our own layout and other libraries'."""

from wush_jax.checkpoints.checkpoint import load, save
from wush_jax.checkpoints.interchange import export, inspect_folder, read_layers
from wush_jax.checkpoints.layouts import LAYOUTS, layout_of

__all__ = [
    "LAYOUTS",
    "export",
    "inspect_folder",
    "layout_of",
    "load",
    "read_layers",
    "save",
]
