"""The command as a module: ``python -m wush_jax``."""

import sys

from wush_jax.cli import main

sys.exit(main())
