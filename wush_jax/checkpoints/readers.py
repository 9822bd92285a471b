"""What other libraries do with an export of ours: compute something else, or stop.

Source: vLLM (compressed-tensors transforms, FP-Quant), transformers 5.24, compressed-tensors 0.20,
FP-Quant's inference library; read, not run, but for transformers and compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from wush_jax.checkpoints.layouts import compressed_tensors, fp_quant
from wush_jax.checkpoints.layouts.layout import Content

COMPRESSED = (compressed_tensors.NV, compressed_tensors.MX)


def check_rotated(content: Content, layout: str, rotated: bool) -> None:
    """Refuse an export that transformers would load without a word and compute wrongly.

    Raises:
      ValueError: transforms in a layout whose readers do not all apply them, unless ``rotated``.
    """
    names = _transformed(content)
    if layout in COMPRESSED and names and not rotated:
        raise ValueError(
            f"layout={layout!r} with the transform of {_some(names)}: vLLM and compressed-tensors "
            "apply it, transformers does not look at it, and would compute nonsense without a "
            "word. For vLLM say rotated=True (--rotated); for transformers quantize with "
            "transform='identity'"
        )


def notes(content: Content, layout: str) -> tuple[str, ...]:
    """Return what a user has to know before serving an export; empty where there is nothing."""
    names = _transformed(content)
    if layout in COMPRESSED and names:
        return tuple(_compressed_notes(content, names))
    if layout == fp_quant.NAME:
        return tuple(_fp_quant_notes(content))
    return ()


def _compressed_notes(content: Content, names: list[str]) -> Iterable[str]:
    yield "vLLM runs input transforms at tensor parallel 1 only; transformers does not run them"
    biased = [name for name in names if f"{name}.bias" in content.plain]
    if biased:
        yield (
            f"{_some(biased)} have biases, which vLLM's layers with transforms do not take: it "
            "stops at the first token; quantize them with transform='identity', or skip them"
        )


def _fp_quant_notes(content: Content) -> Iterable[str]:
    shapes = {np.shape(p.transform) for p in content.layers.values() if p.transform is not None}
    if any(len(shape) == 3 for shape in shapes):
        yield (
            "a transform for each block is read by the WUSH authors' code and by this library; "
            "vLLM and transformers have room for one (d, d) matrix: for them quantize with "
            "transform='hadamard', or with shared_blocks=True"
        )
    sizes = sorted({shape[-1] for shape in shapes} - {16, 32, 64, 128})
    if sizes:
        yield f"blocks of {sizes} are none of 16, 32, 64 and 128, which the readers' kernels have"


def _transformed(content: Content) -> list[str]:
    return [name for name, packed in content.layers.items() if packed.transform is not None]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
