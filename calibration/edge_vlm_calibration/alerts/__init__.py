"""The section `alerts`: marked events, what the model says of the footage, thresholds."""
