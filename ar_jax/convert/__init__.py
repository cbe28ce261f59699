"""Released checkpoints: a table of names for every family, and the command that converts there and back."""
