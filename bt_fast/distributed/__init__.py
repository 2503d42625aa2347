"""Ranks: how they are started, find each other, exchange tensors, and stop."""
