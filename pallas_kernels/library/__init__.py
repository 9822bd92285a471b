"""Products that XLA and its libraries compute: for other devices and for many tokens."""
