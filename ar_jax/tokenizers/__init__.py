"""Tokenizers: images to tokens and back, one file for each, and their quantisers."""
