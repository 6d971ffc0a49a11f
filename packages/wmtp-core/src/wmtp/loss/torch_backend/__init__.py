"""Plain torch implementation of the loss."""
