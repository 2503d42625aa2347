"""From a data set to batches of two crops per image."""
