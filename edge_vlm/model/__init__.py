"""The model in PyTorch: one implementation that training, calibration and export share."""
