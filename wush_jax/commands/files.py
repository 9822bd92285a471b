"""``wush export``, ``wush inspect`` and ``wush bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from flax import nnx

from wush_jax.checkpoints import checkpoint, interchange
from wush_jax.commands.terminal import console
from wush_jax.layers.served import served, served_table

Layout = Literal[interchange.WRITABLE]  # type: ignore[valid-type]  # made of the names there
Arguments = Annotated[tuple[str, ...], tyro.conf.Positional]


def export(
    source: tyro.conf.Positional[Path], *, out: Path, layout: Layout, rotated: bool = False
) -> None:
    """Write a quantized model in the layout of another library; nothing is quantized again.

    Args:
      source: folder of a quantized model, in any layout that we read.
      out: folder to write.
      layout: the layout.
      rotated: the reader applies the transforms in compressed-tensors' files: vLLM does,
        transformers does not.
    """
    for note in interchange.export(out, source, layout, rotated=rotated):
        console().print(f"note: {note}")
    console().print(f"{out}: {layout}")


def inspect(
    folder: tyro.conf.Positional[Path], *, all_layers: bool = False, kernels: bool = False
) -> None:
    """Say what is in a model folder: layout, formats, transforms, sizes; weights stay unread.

    Args:
      folder: with config.json and safetensors files.
      all_layers: a row for every layer, not one for those alike.
      kernels: load the model, and say which implementation each kind of layer runs on this device
        for 1, 16, 64 and 1024 tokens, and why not a faster one.
    """
    summary = interchange.inspect_folder(folder)
    console().print(summary.table(all_layers))
    if kernels:
        loaded = checkpoint.load(folder)
        if not isinstance(loaded, nnx.Module):
            raise ValueError(f"--kernels: {folder} holds packed weights, no model that runs them")
        console().print(served_table(served(loaded)))


def bench(arguments: Arguments = ()) -> None:
    """Measure the kernels on this machine's GPU, as ``python -m pallas_kernels.benchmarks`` does.

    Args:
      arguments: such as --formats MXFP4 --rows 1 16.
    """
    from pallas_kernels.benchmarks import bench as kernels

    kernels.main(list(arguments))
