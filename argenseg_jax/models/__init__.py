"""The networks, as functional Flax Linen modules."""
