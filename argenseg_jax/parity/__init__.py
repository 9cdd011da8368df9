"""The command `verify`: compares the model with recordings of the official PyTorch code, array by array."""
