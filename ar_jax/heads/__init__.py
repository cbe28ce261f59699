"""Heads: what turns a hidden row into a token, one file for each kind of distribution, and what flows share."""
