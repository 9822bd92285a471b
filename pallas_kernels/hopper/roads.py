"""The ways that a product of many tokens may take, and which of them a table says is fastest."""

from __future__ import annotations

from pallas_kernels import exactly, fragments
from pallas_kernels import precision as losses
from pallas_kernels.hopper import plans, tiles

LIBRARY = {"library", "fast"}


def pair(weights, fmt) -> str | None:
    """What is multiplied, as tables of roads name it; None where there is one road only.

    What multiplies in bfloat16 takes as long whatever the activations are, and whatever codes.
    """
    alike = len({(w.format, w.operand) for w in weights}) == 1
    if fmt is None or not alike or not exactly.multiplies_in_float8(fmt):
        return None
    if weights[0].operand == "float8":
        return "mxfp4" if exactly.in_float8(fmt) else None
    kind = fragments.carrier(weights[0].format).kind
    return "nvfp4" if kind in ("nvfp4", "nvint4") else None


def allowed(weights, fmt, precision, *, gated: bool = False) -> set[str]:
    """Return the ways that a product of many tokens may take.

    "fused": weights are expanded in registers, as for few tokens. "folded": rounded to FP8 once,
    then our kernel. "library", "fast": MXFP4 in FP8 once, then cuBLASLt's product, fast ones with
    short sums.

    Args:
      weights: `Fragments`, one or several.
      fmt: of the activations.
      precision: what the caller allows, see `pallas_kernels.precision`.
      gated: the products are combined, by a kernel.
    """
    kind = pair(weights, fmt)
    if kind == "nvfp4" and losses.folded(precision):
        return {"fused", "folded"}
    if kind != "mxfp4" or gated:
        return {"fused"}
    short = losses.fast(precision, weights[0].shape[1])
    return {"fused", "library", "fast"} if short else {"fused", "library"}


def fastest(tokens: int, weights, fmt, device: str, choice: set[str]) -> str:
    """Return the road of a choice that a table says is the fastest for so many tokens."""
    name = pair(weights, fmt)
    if name is None or tokens <= tiles.FEW_TOKENS:
        return "fused"
    sizes = sum(w.grid[0] for w in weights), weights[0].grid[1]
    return plans.road(tokens, *sizes, name, choice, device)
