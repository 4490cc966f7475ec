"""Distances between generated and real images: features, statistics, generation and reference."""
