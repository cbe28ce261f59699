"""Decoding: the parts that `Sampling` is made of (guidance, temperature, filters, decoders), and editing."""
