"""Comparison with numbers recorded from the official PyTorch code."""
