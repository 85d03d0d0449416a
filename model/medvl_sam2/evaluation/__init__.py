"""Scores of a checkpoint beside controls without a network."""
