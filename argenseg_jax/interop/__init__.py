"""Conversion between PyTorch or Hugging Face checkpoints and parameter trees; nothing is unpickled."""
