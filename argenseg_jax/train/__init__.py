"""Training: optimizers, losses, the step and the only loop."""
