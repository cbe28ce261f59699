"""Networks and what they are made of: transformers, attention, conditions, positions, discriminators."""
