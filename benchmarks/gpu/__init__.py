"""Measurements for a GPU that is borrowed for minutes: see scripts/gpu."""
