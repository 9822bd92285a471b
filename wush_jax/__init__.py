"""Near-optimal adaptive transforms (WUSH) for 4-bit quantization in JAX: the public names."""

from wush_jax.checkpoint import load as load
from wush_jax.checkpoint import save as save
from wush_jax.evaluate import kl_divergence as kl_divergence
from wush_jax.evaluate import perplexity as perplexity
from wush_jax.formats import INT4 as INT4
from wush_jax.formats import INT8 as INT8
from wush_jax.formats import MXFP4 as MXFP4
from wush_jax.formats import MXFP6 as MXFP6
from wush_jax.formats import MXFP8 as MXFP8
from wush_jax.formats import NVFP4 as NVFP4
from wush_jax.formats import Format as Format
from wush_jax.formats import QuantizedArray as QuantizedArray
from wush_jax.formats import dequantize as dequantize
from wush_jax.formats import fake_quantize as fake_quantize
from wush_jax.linalg import hadamard_matrix as hadamard_matrix
from wush_jax.linear import layer_loss as layer_loss
from wush_jax.linear import quantized_dot as quantized_dot
from wush_jax.model import quantize_model as quantize_model
from wush_jax.moments import Moments as Moments
from wush_jax.moments import second_moment as second_moment
from wush_jax.planning import plan as plan
from wush_jax.quantize import PackedWeight as PackedWeight
from wush_jax.quantize import quantize_weight as quantize_weight
from wush_jax.recipe import Recipe as Recipe
from wush_jax.sequential import Sequential as Sequential
from wush_jax.transforms import BlockTransform as BlockTransform
from wush_jax.transforms import apply_transform as apply_transform
from wush_jax.transforms import hadamard_transform as hadamard_transform
from wush_jax.transforms import identity_transform as identity_transform
from wush_jax.transforms import predicted_gain as predicted_gain
from wush_jax.transforms import predicted_loss as predicted_loss
from wush_jax.transforms import random_transform as random_transform
from wush_jax.transforms import wush_transform as wush_transform

# isort: split
# Last: importing the module wush_jax.quantize bound its own name in this package.
from wush_jax.formats import quantize as quantize
