"""Encoder, projector, and the batch norm between their layers."""
