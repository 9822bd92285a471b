"""Recipes with a name, for any format: ``BEST.replace(format=NVFP4)`` is the best for NVFP4."""

from wush_jax.solvers.recipe import Recipe

#: To have a model in seconds: WUSH by rounding, with the better scale rules.
FAST = Recipe(share_transform=False, activation_format="tuned", scale_search="sweep")

#: To compare with: GPTQ-WUSH exactly as in the paper: algorithm 2, one transform a layer,
#: d = group, AbsMax scales.
PAPER = Recipe(solver="gptq", share_transform=False)

#: To keep: the least KL known at the same bits, transforms of the same size, the same passes; only
#: offline work and scale rules differ: better scales, transforms fitted again to the codes, sweeps
#: over the codes. GPTQ aims at the inputs as they are: making up for the error of quantized inputs
#: (``input_error="sample"``) lowers the loss of every layer and raises the KL of a language model.
#: What each part brings: docs/quality.md. With ``share_transform=True`` layers of one site need one
#: transform+quantize pass, at some loss.
BEST = Recipe(
    solver="gptq",
    share_transform=False,
    activation_format="tuned",
    scale_search="sweep",
    interleave=False,
    descent=4,
    refit=3,
    block_gain=True,
)

#: Where transforms may be larger: blocks of 128 channels, or 64, 32, 16 where K is no multiple. A
#: transform of 128 bfloat16 a channel is a quarter of the bytes of a 4-bit weight with 1024
#: outputs; `wush_jax.calibration.auto` chooses d for each site.
BEST_WIDE = BEST.replace(block_size="widest")
