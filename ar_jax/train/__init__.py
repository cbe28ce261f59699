"""Training: recipes (what a method does in an update), the loop that runs them, checkpoints, optimisers."""
