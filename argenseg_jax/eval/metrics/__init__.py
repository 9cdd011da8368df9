"""Metrics by name, each a function of the stored predictions."""
