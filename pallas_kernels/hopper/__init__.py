"""Kernels for NVIDIA Hopper, written for Pallas' Mosaic GPU backend, and their parts."""
