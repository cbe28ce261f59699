"""Evaluation: networks that judge, metrics, and the results that say what was measured."""
