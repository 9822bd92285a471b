"""Measuring kernels on a GPU: ``python -m pallas_kernels.benchmarks``."""
