"""Exponential moving averages of weights: tracked, stored as snapshots, and rebuilt at any width."""
