"""Scores of images: how certain the model is, how much was corrected."""
