"""Magnitudes of a model in training, recorded and drawn."""
