"""Training by steps: one process or many, from a checkpoint or from random weights."""
