"""Training: losses, optimisers and steps, as pure functions over parameter trees. Nothing in the model imports it."""
