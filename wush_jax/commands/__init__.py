"""The subcommands of ``wush``: each a typed function that `wush_jax.cli` turns into flags."""
