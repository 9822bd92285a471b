"""Recipes with a name: the paper's setting, and the best that is known at the same run-time cost.

They are plain recipes; ``BEST.replace(format=NVFP4)`` is the best for NVFP4.
"""

from wush_jax.solvers.recipe import Recipe

#: GPTQ-WUSH exactly as in the paper: algorithm 2, one transform a layer, d = group, AbsMax scales.
PAPER = Recipe(solver="gptq", share_transform=False)

#: The same bits, transforms of the same size, the same passes; only offline work and scale rules
#: differ: better scales, transforms fitted again to the codes, sweeps over the codes. GPTQ aims at
#: the inputs as they are: making up for the error of quantized inputs (``input_error="sample"``)
#: lowers the loss of every layer and raises the KL of a language model. What each part brings:
#: docs/quality.md. With ``share_transform=True`` layers of one site need one transform+quantize
#: pass, at some loss.
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

#: Blocks of 128 channels: less loss for a transform of 128 bfloat16 a channel (a quarter of the
#: bytes of a 4-bit weight with 1024 outputs). K must be a multiple of 128;
#: `wush_jax.calibration.auto` chooses d for each site.
BEST_WIDE = BEST.replace(block_size=128)
