"""Commands: one module per command, flags in, one JSON line out."""
