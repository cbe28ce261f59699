"""Encoders of captions."""
