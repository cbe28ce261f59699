"""Generators: what predicts tokens from other tokens, by what a step sees (past, any known, noisy groups)."""
