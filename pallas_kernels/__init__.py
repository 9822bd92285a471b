"""Device code: fused transform, quantization and matmul, with plain JAX as definition and fallback.

The package knows numbers only through the format object it is handed; it imports nothing but jax.
"""

from pallas_kernels.dispatch import quantized_matmul as quantized_matmul
from pallas_kernels.dispatch import transform_quantize as transform_quantize
from pallas_kernels.dispatch import transform_quantize_matmul as transform_quantize_matmul
