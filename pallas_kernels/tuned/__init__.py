"""Tuned tile tables, one JSON file a device."""
