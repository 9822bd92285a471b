"""The command ``python -m pallas_kernels.benchmarks``."""

from pallas_kernels.benchmarks.bench import main

main()
