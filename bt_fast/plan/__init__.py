"""Predicted cost of a training step and of a whole run, without running it."""
