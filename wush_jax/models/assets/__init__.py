"""Data files of the package: the demonstration model."""
