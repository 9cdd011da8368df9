"""Weights to and from PyTorch, and the check against recordings of the reference."""
