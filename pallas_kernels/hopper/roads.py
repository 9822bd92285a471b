"""The ways that a product of many tokens may take, and which of them a table says is fastest."""

from __future__ import annotations

from pallas_kernels import exactly, fragments
from pallas_kernels import precision as losses
from pallas_kernels.hopper import plans, tiles

LIBRARY = {"library", "fast"}


def pair(weights, fmt) -> str | None:
    """What is multiplied, as tables of roads name it; None where there is one road only."""
    alike = len({(w.format, w.operand) for w in weights}) == 1
    if fmt is None or not alike or not exactly.multiplies_in_float8(fmt):
        return None
    kind = fragments.carrier(weights[0].format, weights[0].operand).kind
    if kind == "mxfp4" and weights[0].operand != "float8":
        return None
    left = "fp8" if fmt.element.name == "e4m3" else "mxfp4"
    # What multiplies in bfloat16 takes as long whatever the activations are, and whatever codes.
    return f"mxfp4 by {left}" if kind == "mxfp4" else {"nvint4": "nvfp4"}.get(kind, kind)


def allowed(weights, fmt, precision, *, gated: bool = False) -> set[str]:
    """Return the ways that a product of many tokens may take.

    "fused": as for few tokens. "expanded", "folded": weights in FP8 once, then our kernel; folded
    ones are rounded. "library", "fast": then cuBLASLt's product, which MXFP4 by MXFP4 only can
    take; fast ones with short sums.

    Args:
      weights: `Fragments`, one or several.
      fmt: of the activations.
      precision: what the caller allows, see `pallas_kernels.precision`.
      gated: the products are combined, by a kernel.
    """
    exact = pair(weights, fmt) in ("mxfp4 by mxfp4", "mxfp4 by fp8")
    found = {"fused"} | ({"expanded"} if exact else set())
    if losses.folded(precision):
        found.add("folded")
    if pair(weights, fmt) == "mxfp4 by mxfp4" and not gated:
        found.add("library")
        if losses.fast(precision, weights[0].shape[1]):
            found.add("fast")
    return found


def fastest(tokens: int, weights, fmt, device: str, choice: set[str]) -> str:
    """Return the road of a choice that a table says is the fastest for so many tokens."""
    name = pair(weights, fmt)
    if name is None or tokens <= tiles.FEW_TOKENS:
        return "fused"
    sizes = sum(w.grid[0] for w in weights), weights[0].grid[1]
    return plans.road(tokens, *sizes, name, choice, device)
