"""Drawn scenes: training data without a download, and what the shipped model knows."""
