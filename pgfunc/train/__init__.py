"""Training: losses, optimizers and steps, as pure functions on parameter trees. Nothing in the model imports it."""
