"""Programs compiled for TPUs that are not at hand: memory, operations, traffic, time."""
