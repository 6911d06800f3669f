"""Training data: records of videos, the rendered world, mixtures, message trees, packing."""
