"""From files on disk to batches of numpy arrays."""
